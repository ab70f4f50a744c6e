"""A .gguf file, or several parts of one, as a model: its tensors' names, and their decoding."""

from pathlib import Path as FilePath

import gguf
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from models.checkpoints.gguf_config import ROPE_DIVISORS, config_from_gguf
from models.checkpoints.gguf_encodings import is_decodable, undecodable_encoding
from models.checkpoints.gguf_header import GgufTensor
from models.checkpoints.gguf_levels import FORMATS, levels_of
from models.checkpoints.gguf_parts import read_gguf_parts
from models.checkpoints.levels import Arrays, converted
from models.checkpoints.packed_tensors import PackedTensors
from models.checkpoints.tensor_source import TensorSource
from models.errors import InputError
from models.families import FAMILIES
from models.formats import WeightFormat
from models.parameters import Path

_NAMES: dict[Path, str] = {
    ("embedding",): "token_embd.weight",
    ("layers", "attention_norm"): "blk.{layer}.attn_norm.weight",
    ("layers", "query"): "blk.{layer}.attn_q.weight",
    ("layers", "key"): "blk.{layer}.attn_k.weight",
    ("layers", "value"): "blk.{layer}.attn_v.weight",
    ("layers", "query_bias"): "blk.{layer}.attn_q.bias",
    ("layers", "key_bias"): "blk.{layer}.attn_k.bias",
    ("layers", "value_bias"): "blk.{layer}.attn_v.bias",
    ("layers", "query_norm"): "blk.{layer}.attn_q_norm.weight",
    ("layers", "key_norm"): "blk.{layer}.attn_k_norm.weight",
    ("layers", "output"): "blk.{layer}.attn_output.weight",
    ("layers", "mlp_norm"): "blk.{layer}.ffn_norm.weight",
    ("layers", "gate"): "blk.{layer}.ffn_gate.weight",
    ("layers", "up"): "blk.{layer}.ffn_up.weight",
    ("layers", "down"): "blk.{layer}.ffn_down.weight",
    ("final_norm",): "output_norm.weight",
    ("unembedding",): "output.weight",
}


def open_gguf(path: FilePath) -> TensorSource:
    """Read a GGUF model's headers and check its tensors; `TensorSource.load` reads their data.

    Args:
      path: the file, or the first part of several.

    Raises:
      InputError: not a GGUF file, truncated, parts that are missing or do not fit, of an unknown
        architecture, or with tensors that do not fit the config or that the `gguf` package cannot
        decode.
    """
    parts = read_gguf_parts(path)

    def raw(name: str) -> Float[np.ndarray, "..."]:
        return read_gguf_tensor(parts.file_of[name], parts.tensors[name])

    def check_decodable(name: str) -> None:
        encoding = parts.tensors[name].kind
        if not is_decodable(encoding):
            raise InputError(
                f"{parts.file_of[name]}: tensor {name} is encoded as "
                f"{undecodable_encoding(encoding)}"
            )

    def divisors() -> tuple[float, ...]:
        check_decodable(ROPE_DIVISORS)
        return tuple(raw(ROPE_DIVISORS).ravel().tolist())

    shapes = {name: tensor.shape for name, tensor in parts.tensors.items()}
    config = config_from_gguf(
        path, parts.metadata, shapes, divisors if ROPE_DIVISORS in shapes else None
    )
    for name in parts.tensors:
        check_decodable(name)
    permuted = {}
    if FAMILIES[config.architecture].gguf_interleaved:
        permuted = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}

    def in_order(name: str, rows: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        heads = permuted.get(name.split(".", 2)[-1])
        return rows if heads is None else half_split_rows(rows, heads)

    def read_packed(name: str, format: WeightFormat) -> Arrays:
        tensor = parts.tensors[name]
        rows = read_bytes(parts.file_of[name], tensor).reshape(tensor.shape[0], -1)
        arrays = converted(levels_of(rows, tensor.kind), FORMATS[tensor.kind], format)
        return {key: in_order(name, array) for key, array in arrays.items()}

    kinds = {name: tensor.kind for name, tensor in parts.tensors.items()}
    source = TensorSource(
        where=str(path),
        config=config,
        names=_NAMES,
        shapes=shapes,
        read=lambda name: in_order(name, raw(name)),
        packed=PackedTensors(
            {name: FORMATS[kind] for name, kind in kinds.items() if kind in FORMATS}, read_packed
        ),
        harmless=lambda name: name == ROPE_DIVISORS,
    )
    source.check()
    return source


def read_gguf_tensor(path: FilePath, tensor: GgufTensor) -> Float[np.ndarray, "..."]:
    """Read and decode one tensor: float32, or float16 where the file stores that."""
    data = read_bytes(path, tensor)
    if tensor.kind == gguf.GGMLQuantizationType.F16:
        return data.view(np.float16).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    if tensor.kind == gguf.GGMLQuantizationType.F32:
        rows = rows.view(np.float32)
    return gguf.quants.dequantize(rows, tensor.kind).reshape(tensor.shape)


def read_bytes(path: FilePath, tensor: GgufTensor) -> UInt8[np.ndarray, "size"]:
    """Read one tensor as it is in the file; InputError if it cannot be read."""
    try:
        data = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if data.size != tensor.size:
        raise InputError(f"{path} became shorter while it was read")
    return data


def half_split_rows(
    matrix: Shaped[np.ndarray, "heads_times_dim width"], num_heads: int
) -> Shaped[np.ndarray, "heads_times_dim width"]:
    """Undoes llama.cpp's order of query and key rows.

    It stores each head's rows so that RoPE turns neighbours (2i, 2i + 1); the decoder turns
    (i, i + head_dim / 2).
    """
    rows, width = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
