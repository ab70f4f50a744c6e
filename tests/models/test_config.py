"""config.json: both spellings are read, and nothing that matters is ignored."""

import math
from typing import Any

import numpy as np
import pytest

from models.checkpoints.hf_config import config_from_hf
from models.config import ModelConfig, RopeScaling
from models.errors import InputError
from models.rope import inverse_frequencies
from tests.support import tiny_models

LLAMA = tiny_models.CONFIGS["llama"]
QWEN2 = tiny_models.CONFIGS["qwen2"]
MISTRAL = tiny_models.CONFIGS["mistral"]
ABSENT = "absent"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_hashable_and_stored_as_json(name: str) -> None:
    config = config_from_hf(tiny_models.CONFIGS[name])
    assert ModelConfig.from_json(config.to_json()) == config
    assert {config: 1}[ModelConfig.from_json(config.to_json())] == 1


@pytest.mark.parametrize("name", ["llama", "llama31", "qwen2_yarn"])
def test_both_spellings_of_rope(name: str) -> None:
    old = dict(tiny_models.CONFIGS[name])
    new = dict(old)
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = scaling | {"rope_theta": new.pop("rope_theta")}
    assert config_from_hf(new) == config_from_hf(old)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "not positive"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, "expected a number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer type"),
        ({"rope_scaling": [8]}, "differ by layer type"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"quantization": {"bits": 4}}, "quantization is set, which is not supported; take the"),
        ({"is_causal": False}, "is_causal is False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning is True"),
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval is 4"),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"alibi": True}, "alibi is True"),
        ({"clip_qkv": 8}, "clip_qkv is 8"),
        ({"logit_scale": 0.06}, "logit_scale is 0.06"),
        ({"scale_emb": 12}, "scale_emb is 12"),
        ({"scale_depth": 1.4}, "scale_depth is 1.4"),
        ({"dim_model_base": 256}, "dim_model_base is 256"),
        ({"n_routed_experts": 64}, "n_routed_experts is 64"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta is 0.1"),
        ({"dual_chunk_attention_config": [1]}, "dual_chunk_attention_config is [1]; expected"),
        ({"dual_chunk_attention_config": {"chunk_size": 0.5}}, "expected a whole number"),
        ({"dual_chunk_attention_config": {"chunk_size": -1}}, "chunk_size is -1; expected > 0"),
        ({"model_type": "gemma3"}, "'gemma3' is not supported; supported are: llama, mistral"),
        ({"model_type": None, "architectures": ["PhiForCausalLM"]}, "'phi'"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.5}, "expected a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"head_dim": 15}, "even"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"hidden_size": "64"}, "'64'"),
        ({"hidden_size": math.nan}, "hidden_size is nan; expected a number"),
        ({"hidden_size": 10**400}, "expected a number"),
        ({"max_position_embeddings": math.nan}, "max_position_embeddings is nan"),
        ({"layer_types": 5}, "layer_types is 5; expected a list"),
        ({"layer_types": [5, "a", [1]]}, "layer_types ['5', '[1]', 'a'] are not supported"),
        ({"model_type": None, "architectures": 5}, "architectures is 5; expected a list"),
        ({"rope_scaling": YARN | {"mscale": "x", "mscale_all_dim": 1}}, "mscale is 'x'"),
        ({"rope_scaling": YARN | {"factor": 1e308}}, "factor 1e+308 makes a context of inf"),
        ({"rope_scaling": YARN | {"factor": 1e30}}, "expected fewer than 2147483648"),
        ({"rope_parameters": [1]}, "differ by layer type"),
        ({"rope_scaling": YARN, "rope_parameters": [1]}, "differ by layer type"),
        ({"bos_token_id": "1"}, "config.json: bos_token_id is '1'; expected a token id"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        config_from_hf(LLAMA | changes)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "max_context"),
    [
        (LLAMA, 256),
        (MISTRAL, 128),
        (MISTRAL | {"sliding_window": None}, 256),
        (QWEN2 | {"sliding_window": 100}, 256),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True}, 100),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, 256),
        (
            QWEN2
            | {
                "sliding_window": 100,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 3,
            },
            256,
        ),
        # Where the file names no width, it is transformers' own, 4096, whatever names the layers.
        (
            QWEN2
            | {
                "max_position_embeddings": 9000,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "sliding_window": ABSENT,
            },
            4096,
        ),
        (
            QWEN2
            | {
                "max_position_embeddings": 9000,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "sliding_window": ABSENT,
            },
            4096,
        ),
        # Qwen's own instructions for YaRN leave max_position_embeddings as it was.
        (
            QWEN2
            | {
                "max_position_embeddings": 64,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            256,
        ),
    ],
)
def test_max_context(config: dict[str, Any], max_context: int) -> None:
    config = {key: value for key, value in config.items() if value != ABSENT}
    assert config_from_hf(config).max_context == max_context


@pytest.mark.parametrize(
    ("settings", "max_context"),
    [
        ({"chunk_size": 100, "local_size": 8, "original_max_position_embeddings": 90}, 90),
        ({"chunk_size": 80, "local_size": 8, "original_max_position_embeddings": 90}, 80),
        ({"chunk_size": 100}, 100),
        ({"chunk_size": 1000, "original_max_position_embeddings": 1000}, 256),
        ({"local_size": 8}, 256),
        ({}, 256),
        (None, 256),
    ],
)
def test_context_of_dual_chunk_attention(settings: dict[str, Any] | None, max_context: int) -> None:
    """Up to a chunk, it is plain attention; past it, the model was made for other positions."""
    config = config_from_hf(QWEN2 | {"dual_chunk_attention_config": settings})
    assert config.max_context == max_context
    longer = QWEN2 | {"max_position_embeddings": 9000, "dual_chunk_attention_config": {"a": 1}}
    assert config_from_hf(longer).max_context == 8192


def test_settings_that_change_nothing() -> None:
    neutral = {
        "use_mrope": False,
        "is_causal": True,
        "logit_scale": 1.0,
        "no_rope_layer_interval": 0,
        "attention_chunk_size": None,
        "pretraining_tp": 2,
        "attention_dropout": 0.1,
    }
    assert config_from_hf(QWEN2 | neutral) == config_from_hf(QWEN2)
    qwen3 = tiny_models.CONFIGS["qwen3"]
    assert config_from_hf(qwen3 | {"use_qk_norm": True}) == config_from_hf(qwen3)


@pytest.mark.parametrize("ids", ["2", ["</s>"], 2.0, 3.5, 2**32 - 1, -1, True, ["a", 3], [None]])
def test_end_tokens_that_are_no_ids(ids: Any) -> None:
    said = r"config\.json: eos_token_id is .*; expected a token id"
    with pytest.raises(InputError, match="^" + said):
        config_from_hf(LLAMA | {"eos_token_id": ids})
    with pytest.raises(InputError, match="^generation_" + said):
        config_from_hf(LLAMA, {"eos_token_id": ids})


@pytest.mark.parametrize("layers", ["28", math.nan])
def test_max_window_layers_that_is_no_number(layers: Any) -> None:
    changes = {"use_sliding_window": True, "max_window_layers": layers}
    with pytest.raises(InputError, match="max_window_layers is"):
        config_from_hf(QWEN2 | changes)


def test_defaults_and_tokens() -> None:
    minimal = {
        key: value
        for key, value in LLAMA.items()
        if key not in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "hidden_act")
    }
    config = config_from_hf(minimal | {"architectures": ["LlamaForCausalLM"]})
    assert (config.num_kv_heads, config.rope_theta, config.norm_eps) == (4, 10000.0, 1e-6)
    assert (config.stop_token_ids, config.bos_token_id) == ((2,), 1)
    config = config_from_hf(LLAMA | {"eos_token_id": [7, 8]}, {"eos_token_id": [8, 9]})
    assert config.stop_token_ids == (7, 8, 9)
    assert config_from_hf(QWEN2 | {"eos_token_id": None}).stop_token_ids == ()


def test_frequencies_by_hand() -> None:
    """Llama 3.1's own numbers at its first, last and a middle frequency."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=8,
        num_layers=1,
        hidden_size=128,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=128,
        max_context=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_context=8192),
    )
    frequencies = inverse_frequencies(config)
    assert frequencies.dtype == np.float32
    assert frequencies[0] == 1
    last = 500000 ** (-126 / 128) / 8
    np.testing.assert_allclose(frequencies[-1], last, rtol=1e-6)
    plain = 500000 ** (-64 / 128)
    smooth = (8192 * plain / (2 * np.pi) - 1) / 3
    middle = (1 - smooth) * plain / 8 + smooth * plain
    np.testing.assert_allclose(frequencies[32], middle, rtol=1e-6)
