"""Tiny models made from a seed, the same on any machine: weights need not be stored.

Imports neither jax nor torch, since both the tests and the script that records transformers'
outputs read it. Norm weights and biases are random too: at 1 and 0, where they start, they hide
mistakes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

BATCH, PREFILL, DECODE = 2, 48, 32
VOCAB = 64

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2 = _LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    # Seven query heads share a kv head, as in Qwen2.5-0.5B.
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_size": 112,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"rope_theta": 10000.0},
    # The original context is such that the 8 frequencies fall in all three of llama3's bands.
    "llama31": _LLAMA
    | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_linear": _LLAMA
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "qwen2": _QWEN2,
    "qwen2_yarn": _QWEN2
    | {
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
        },
    },
    "qwen2_yarn_mscale": _QWEN2
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
    },
    # Its head_dim is not hidden_size / num_attention_heads.
    "qwen3": _LLAMA
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 24,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "mistral": _LLAMA
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 128,
        "rope_theta": 10000.0,
    },
    # SmolLM2's head counts and theta.
    "smollm2": _LLAMA
    | {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "tie_word_embeddings": True,
        "rope_theta": 100000,
        "rope_interleaved": False,
        "is_llama_config": True,
    },
}

FAMILIES = [name for name, config in CONFIGS.items() if config["model_type"] == name]
"""One model of each family: the one that has its name."""


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face's names for the model that `config` describes."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        in_layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, query_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
        }
        if config["model_type"] == "qwen2":
            in_layer["self_attn.q_proj.bias"] = (query_size,)
            in_layer["self_attn.k_proj.bias"] = (kv_size,)
            in_layer["self_attn.v_proj.bias"] = (kv_size,)
        if config["model_type"] == "qwen3":
            in_layer["self_attn.q_norm.weight"] = (head_dim,)
            in_layer["self_attn.k_norm.weight"] = (head_dim,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    # A bit generator's raw output never changes with numpy's version; its distributions may.
    bits = np.random.PCG64(seed)
    return {name: _tensor(name, shape, bits) for name, shape in shapes.items()}


def make_tokens(config: dict[str, Any], seed: int = 1) -> np.ndarray:
    """Random tokens, int32 ``[batch, prefill + decode]``."""
    bits = np.random.PCG64(seed).random_raw(BATCH * (PREFILL + DECODE))
    return (bits % config["vocab_size"]).astype(np.int32).reshape(BATCH, -1)


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    dtype: DTypeLike = np.float32,
    shards: int = 1,
) -> None:
    """Writes a Hugging Face folder: config.json and one or more safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Interleaved, so that a layer's tensors lie in several files.
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensor(name: str, shape: tuple[int, ...], bits: np.random.PCG64) -> np.ndarray:
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    uniform = (raw.astype(np.float32) / np.float32(2**23) - 1).reshape(shape)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.5) * uniform
    if name.endswith("bias"):
        return uniform
    if name == "model.embed_tokens.weight":
        return uniform
    return uniform * np.float32((3 / shape[-1]) ** 0.5)
