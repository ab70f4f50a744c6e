"""The metadata of a GGUF file as a ModelConfig."""

import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.gguf_header import END_KINDS, named_tokens, number_of
from models.config import ModelConfig, RopeScaling, scaled_context, yarn_attention_factor
from models.errors import InputError
from models.families import family_of_gguf, layers_with_rope, unknown_architecture
from models.parameters import Shape

_EMBEDDING = "token_embd.weight"
ROPE_DIVISORS = "rope_freqs.weight"
# Settings, below the architecture's name, that change what a model computes and that the decoder
# has no code for. Any value but those listed is refused: ignoring it would give wrong text.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Kinds of GGUF files that are no language models by themselves.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter; merge it into its model (llama-export-lora) and give that",
    "mmproj": "the part of a model that reads images; give the model's own file",
    "imatrix": "an importance matrix; give the model's own file",
    "vocab": "a vocabulary without weights; give the model's own file",
}


def config_from_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    rope_divisors: Callable[[], tuple[float, ...]] | None = None,
) -> ModelConfig:
    """Read the metadata of a model of one of the families.

    Args:
      path: the file, for messages.
      metadata: by key.
      shapes: of the file's tensors, by name.
      rope_divisors: reads the tensor `ROPE_DIVISORS`, where there is one.

    Raises:
      InputError: unknown architecture, a feature that the decoder lacks, or a value that makes no
        sense.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        what = _OTHER_KINDS.get(str(kind), "no model; give a file of type model")
        raise InputError(f"{path} is of type {reprlib.repr(kind)}: {what}")
    architecture = metadata.get("general.architecture", "unnamed")
    family = family_of_gguf(architecture)
    if family is None:
        raise InputError(f"{path}: {unknown_architecture(str(architecture))}")
    keys = _Keys(path, metadata, architecture)
    if keys.number("expert_count", 0):
        raise InputError(f"{path} is a mixture of experts, which is not supported")
    if len(shapes.get(_EMBEDDING, ())) != 2:
        raise InputError(f"{path} is not a language model: it has no matrix {_EMBEDDING}")
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{path}: keys and values of different sizes are not supported")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: RoPE on a part of each head is not supported")
    _refuse_what_is_not_supported(keys, head_dim)
    max_context = keys.integer("context_length")
    scaling = _rope_scaling(keys, max_context, rope_divisors)
    max_context = scaled_context(max_context, scaling, str(path))
    window = keys.integer("attention.sliding_window", 0) or None
    ids = named_tokens(path, metadata)
    num_layers = keys.integer("block_count")
    return ModelConfig(
        architecture=family.name,
        vocab_size=shapes[_EMBEDDING][0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_context=min(max_context, window or max_context),
        rope_theta=keys.number("rope.freq_base", family.default_theta),
        rope_scaling=scaling,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        stop_token_ids=tuple(dict.fromkeys(ids[kind] for kind in END_KINDS if kind in ids)),
        bos_token_id=ids.get("bos"),
        sliding_window=window,
        rope_layers=layers_with_rope(num_layers, family.no_rope_interval),
    )


def _refuse_what_is_not_supported(keys: "_Keys", head_dim: int) -> None:
    for key, allowed in _NEUTRAL.items():
        name = f"{keys.architecture}.{key}"
        if keys.metadata.get(name, allowed[0]) not in allowed:
            raise InputError(
                f"{keys.path}: {name} is {reprlib.repr(keys.metadata[name])}, which is not "
                f"supported; supported is {allowed[0]!r}"
            )
    # 0 stands for the usual scale. The file holds it as float32.
    scale, usual = keys.number("attention.scale", 0.0), head_dim**-0.5
    if scale and not math.isclose(scale, usual, rel_tol=1e-5):
        raise InputError(
            f"{keys.path}: {keys.architecture}.attention.scale is {scale:g}, which is not "
            f"supported; supported is {usual:g}, 1 / sqrt(head size)"
        )


def _rope_scaling(
    keys: "_Keys", max_context: int, read_divisors: Callable[[], tuple[float, ...]] | None
) -> RopeScaling | None:
    # As in llama.cpp, a file that states no type has linear scaling, rope.scale_linear is the
    # factor's older name, and a factor of 0 stands for none. An explicit "none" overrides both.
    kind = keys.metadata.get(f"{keys.architecture}.rope.scaling.type", "linear")
    legacy = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", legacy) or 1.0
    if kind == "linear" and factor == 1.0:
        kind = "none"
    # llama.cpp multiplies cosine and sine with it whatever the kind; only YaRN's files need it.
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and attention_factor != 1.0:
        raise InputError(
            f"{keys.path}: {keys.architecture}.rope.scaling.attn_factor {attention_factor:g} "
            f"beside RoPE scaling {kind} is not supported; supported is 1"
        )
    if read_divisors is not None:
        if kind != "none":
            raise InputError(
                f"{keys.path}: {ROPE_DIVISORS} beside {kind} RoPE scaling is not supported"
            )
        return RopeScaling("divisors", divisors=read_divisors())
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=keys.integer("rope.scaling.original_context_length", max_context),
            # llama.cpp multiplies a file's attn_factor with YaRN's own.
            attention_factor=attention_factor * yarn_attention_factor(factor),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise InputError(
        f"{keys.path}: RoPE scaling {kind!r} is not supported; supported are: none, linear, yarn"
    )


class _Keys:
    """Looks up an architecture's metadata, checking that numbers are numbers."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str):
        self.path, self.metadata, self.architecture = path, metadata, architecture

    def number(self, key: str, default: float | int | None = None) -> float:
        return number_of(self.path, self.metadata, f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))
