"""Writes tiny models as GGUF files, as llama.cpp's converter would."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Whose query and key rows llama.cpp's converter reorders, and whose files say another name.
_INTERLEAVED = {"llama", "smollm3"}
_SAYS = {"mistral": "llama"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that Hugging Face calls `name`."""
    stem, kind = name.rsplit(".", 1)
    prefix = ""
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
    return f"{prefix}{_NAMES[stem]}.{kind}"


def interleave_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + head_dim / 2 of each head become neighbours, one pair at a time."""
    half = matrix.shape[0] // heads // 2
    rows = [
        matrix[head * 2 * half + side * half + i]
        for head in range(heads)
        for i in range(half)
        for side in (0, 1)
    ]
    return np.stack(rows)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    encoding: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    encoded: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    **splitting: Any,
) -> None:
    """Writes a model given in Hugging Face's terms. `metadata` overrides (None drops) keys.

    `encoded` gives tensors as they are to stand in the file, bytes with their encoding, in place of
    those in `tensors`. `splitting` are options of `gguf.GGUFWriter` that make several files of it.
    """
    architecture = _SAYS.get(config["model_type"], config["model_type"])
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    values: dict[str, Any] = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.rope.freq_base": float(config.get("rope_theta", 10000.0)),
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", architecture), **splitting)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    for name, tensor in tensors.items():
        for suffix, count in heads.items():
            if architecture in _INTERLEAVED and name.endswith(suffix):
                tensor = interleave_rows(tensor, count)
        if name in (encoded or {}):
            data, kind = encoded[name]
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        elif tensor.ndim == 1 or encoding == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), tensor)
        else:
            data = gguf.quants.quantize(tensor, encoding)
            writer.add_tensor(gguf_name(name), data, raw_dtype=encoding)
    for name, tensor in (extra_tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
