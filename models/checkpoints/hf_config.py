"""A Hugging Face config.json as a ModelConfig."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.checkpoints.hf_layers import rope_layers, sliding_window
from models.checkpoints.hf_numbers import integer_in, number_in
from models.config import ModelConfig, RopeScaling, scaled_context, yarn_attention_factor
from models.errors import InputError
from models.families import (
    FAMILIES,
    Family,
    family_of_hf_class,
    short_class_name,
    unknown_architecture,
)
from models.values import token_ids

# Settings that change what a model computes and that the decoder has no code for. Any value but
# those listed (or the key's absence, or null) is refused: ignoring it would give wrong text. Not
# looked at are a family's own settings.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ((), []),
    "num_local_experts": (0, 1),
    "num_experts": (0,),
    "is_encoder_decoder": (False,),
    "n_routed_experts": (0,),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "no_rope_layer_interval": (0,),
    "use_mrope": (False,),
    "alibi": (False,),
    "clip_qkv": (),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "quantization": (),
    # transformers adds it to the output projection too, for which the decoder has none.
    "attention_bias": (False,),
    "use_qk_norm": (False,),
}
# The same, inside the settings of RoPE.
_NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "llama_4_scaling_beta": (0,),
}


def config_from_hf(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read the config.json of a model of one of the families.

    Both spellings of the RoPE settings are read: `rope_theta` with `rope_scaling` (transformers 4)
    and `rope_parameters` (transformers 5). Where a key is absent, transformers' default holds.

    Args:
      config: the parsed config.json.
      generation_config: the parsed generation_config.json, whose stop tokens are added.

    Raises:
      InputError: unknown architecture, a feature that the decoder lacks, or a value that makes no
        sense.
    """
    family = _family(config)
    _refuse_what_is_not_supported(config, family)
    hidden_size = integer_in(config, "hidden_size")
    num_heads = integer_in(config, "num_attention_heads")
    max_positions = integer_in(config, "max_position_embeddings", family.default_context)
    num_layers = integer_in(config, "num_hidden_layers")
    theta, scaling = _rope(config, max_positions, family.default_theta)
    # Qwen's documents add YaRN without changing max_position_embeddings.
    max_context = scaled_context(max_positions, scaling, "config.json")
    max_context = min(max_context, _plain_attention_context(config) or max_context)
    with_rope = rope_layers(config, family, num_layers)
    window = sliding_window(config, family, num_layers, with_rope)
    usual_head_dim = family.default_head_dim or hidden_size // max(num_heads, 1)
    return ModelConfig(
        architecture=family.name,
        vocab_size=integer_in(config, "vocab_size"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=integer_in(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=integer_in(config, "num_key_value_heads", num_heads),
        head_dim=integer_in(config, "head_dim", usual_head_dim),
        max_context=min(max_context, window or max_context),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number_in(config, "rms_norm_eps", 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", family.ties_embeddings)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        stop_token_ids=_stop_token_ids(config, generation_config or {}),
        bos_token_id=_bos_token_id(config),
        sliding_window=window,
        rope_layers=with_rope,
    )


def _family(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if name:
        family = FAMILIES.get(name) if isinstance(name, str) else None
    else:
        classes = config.get("architectures") or ["unnamed"]
        if not isinstance(classes, list):
            raise InputError(
                f"config.json: architectures is {reprlib.repr(classes)}; expected a list of names"
            )
        name = short_class_name(str(classes[0]))
        family = family_of_hf_class(str(classes[0]))
    if family is None:
        raise InputError(unknown_architecture(str(name)))
    return family


def _refuse_what_is_not_supported(config: Mapping[str, Any], family: Family) -> None:
    for key, allowed in _NEUTRAL.items():
        value = config.get(key)
        if key not in family.own_settings and value is not None and value not in allowed:
            shown = "set" if isinstance(value, dict) else repr(value)
            expected = f"; supported is {allowed[0]!r}" if allowed else ""
            if key == "quantization":
                expected = "; take the model that was quantised, or a GGUF file of it"
            raise InputError(f"config.json: {key} is {shown}, which is not supported{expected}")


def _rope(
    config: Mapping[str, Any], max_positions: int, default_theta: float
) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling from either spelling."""
    parameters = config.get("rope_parameters") or {}
    given = config.get("rope_scaling") or parameters
    if not all(map(_is_flat, (given, parameters))):
        raise InputError("config.json: RoPE settings that differ by layer type are not supported")
    settings = {key: value for key, value in given.items() if value is not None}
    theta = settings.get("rope_theta", parameters.get("rope_theta", config.get("rope_theta")))
    theta = default_theta if theta is None else number_in({"rope_theta": theta}, "rope_theta")
    for key, allowed in _NEUTRAL_ROPE.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise InputError(
                f"config.json: RoPE setting {key} is {settings[key]!r}, which is not supported; "
                f"supported is {allowed[0]!r}"
            )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=number_in(settings, "factor"))
    original = settings.get(
        "original_max_position_embeddings",
        config.get("original_max_position_embeddings") or max_positions,
    )
    original = integer_in({"original": original}, "original")
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=number_in(settings, "factor"),
            original_context=original,
            low_freq_factor=number_in(settings, "low_freq_factor"),
            high_freq_factor=number_in(settings, "high_freq_factor"),
        )
    if kind == "yarn":
        return theta, _yarn(settings, original, max_positions)
    raise InputError(
        f"config.json: RoPE type {kind!r} is not supported; supported are: default, linear, "
        "llama3, yarn"
    )


def _is_flat(settings: Any) -> bool:
    return isinstance(settings, Mapping) and not any(
        isinstance(value, dict) for value in settings.values()
    )


def _yarn(settings: Mapping[str, Any], original: int, max_positions: int) -> RopeScaling:
    factor = number_in(settings, "factor", max_positions / max(original, 1))
    mscale, mscale_all_dim = (number_in(settings, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    attention_factor = yarn_attention_factor(factor)
    if mscale and mscale_all_dim:
        attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(
            factor, mscale_all_dim
        )
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context=original,
        attention_factor=number_in(settings, "attention_factor", attention_factor),
        beta_fast=number_in(settings, "beta_fast", 32.0) or 32.0,
        beta_slow=number_in(settings, "beta_slow", 1.0) or 1.0,
        truncate=bool(settings.get("truncate", True)),
    )


def _plain_attention_context(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which dual chunk attention is plain attention; None where the model has none.

    It reads longer texts in chunks, with other positions between them (An et al. 2024,
    arXiv:2402.17463): plain attention would turn keys by angles that the model has never seen.
    """
    settings = config.get("dual_chunk_attention_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise InputError(
            f"config.json: dual_chunk_attention_config is {reprlib.repr(settings)}; expected an "
            "object"
        )
    # 8192 is the default of the engines that have this attention.
    chunk = integer_in(settings, "chunk_size", 8192)
    original = integer_in(settings, "original_max_position_embeddings", 0)
    limit = min(chunk, original or chunk)
    if limit < 1:
        raise InputError(f"config.json: dual chunk attention's chunk_size is {chunk}; expected > 0")
    return limit


def _stop_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    found = token_ids(config.get("eos_token_id"), "config.json: eos_token_id")
    found += token_ids(
        generation_config.get("eos_token_id"), "generation_config.json: eos_token_id"
    )
    return tuple(dict.fromkeys(found))


def _bos_token_id(config: Mapping[str, Any]) -> int | None:
    return next(iter(token_ids(config.get("bos_token_id"), "config.json: bos_token_id")), None)
