"""Quantised Hugging Face folders, packed by the formats' definitions: number by number, in loops.

Shares no code with what reads them. The numbers that a folder stands for are computed in float64
and rounded to float32 once.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.tiny_models import CONFIGS, make_tensors

Parts = dict[str, np.ndarray]
Packer = Callable[[tuple[int, int], np.random.Generator], tuple[Parts, np.ndarray]]
"""From a matrix's shape: its tensors by the last parts of their names, and its numbers."""

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


def write_quantised(
    folder: Path,
    settings: Any,
    packer: Packer | Callable[[str], Packer | None],
    *,
    by_name: bool = False,
    shards: int = 1,
    change: Callable[[dict[str, np.ndarray]], None] = lambda _: None,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write a tiny Llama whose layers' matrices are random, and quantised.

    Args:
      folder: where to.
      settings: what its config.json says as quantization_config.
      packer: makes each matrix of the layers; or gives the packer of each matrix by its name.
      by_name: whether it is the latter.
      shards: the files of the model.
      change: changes the tensors before they are written.
      config: settings of config.json.

    Returns:
      the numbers of every tensor of the model, by the names of the floats.
    """
    model = CONFIGS["llama"] | SIZES | config
    floats = make_tensors(model)
    tensors: dict[str, np.ndarray] = {}
    for seed, (name, tensor) in enumerate(floats.items()):
        chosen: Any = packer(name) if by_name else packer  # type: ignore[call-arg, arg-type]
        in_layers = tensor.ndim == 2 and ".layers." in name
        if chosen is None or not (in_layers or by_name) or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        parts, floats[name] = chosen(tensor.shape, np.random.default_rng(seed))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{last}": part for last, part in parts.items()}
    change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": settings}))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return floats
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [*tensors][shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return floats


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file by the format's definition, of dtypes that the package does not write too."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def random_scales(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, most: float
) -> np.ndarray:
    """Scales that make weights of usual size, whose largest small number is `most`."""
    return (rng.uniform(0.05, 0.25, shape) / most).astype(dtype)


def float8(byte: int) -> float:
    """The number of a byte of E4M3: a sign, four bits of exponent, three of mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def random_float8(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """Bytes of E4M3, of which 0x7f and 0xff are no numbers; and the numbers."""
    raw = rng.integers(0, 0x7F, shape) | rng.integers(0, 2, shape) << 7
    numbers = np.array([[float8(int(byte)) for byte in row] for row in raw])
    return raw.astype(np.uint8).view(ml_dtypes.float8_e4m3fn), numbers


def fp8(
    scale_shape: Callable[[tuple[int, int]], tuple[int, ...]],
    block: tuple[int, int] | None = None,
    name: str = "weight_scale_inv",
    dtype: Any = np.float32,
) -> Packer:
    """Floats of 8 bits, with scales of a shape: of blocks, of rows or of the matrix."""

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
        weight, small = random_float8(rng, shape)
        scales = random_scales(rng, scale_shape(shape), dtype, 448)
        numbers = np.empty(shape, np.float32)
        for row in range(shape[0]):
            for column in range(shape[1]):
                if block is not None:
                    scale = scales[row // block[0], column // block[1]]
                else:
                    scale = scales.flat[row] if scales.size > 1 else scales.flat[0]
                numbers[row, column] = np.float64(small[row, column]) * np.float64(scale)
        return {"weight": weight, name: scales}, numbers

    return pack


def words(numbers: list[int], bits: int) -> list[int]:
    """Unsigned numbers in 32-bit words, from the lowest bits on; as signed words."""
    each = 32 // bits
    packed = []
    for start in range(0, len(numbers), each):
        word = 0
        for place, number in enumerate(numbers[start : start + each]):
            assert 0 <= number < 2**bits
            word |= number << bits * place
        packed.append(word - 2**32 if word >= 2**31 else word)
    return packed


def word_rows(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Each row of a matrix in words: int32 ``[rows, words]``."""
    rows = [words([int(number) for number in row], bits) for row in numbers]
    return np.array(rows, np.int64).astype(np.int32)


def integer_numbers(
    levels: np.ndarray, zero_points: np.ndarray, scales: np.ndarray, group_of: list[int]
) -> np.ndarray:
    """``(level - zero point) * scale`` of each number, by the group of its column."""
    numbers = np.empty(levels.shape, np.float32)
    for row in range(levels.shape[0]):
        for column, group in enumerate(group_of):
            level = int(levels[row, column]) - int(zero_points[row, group])
            numbers[row, column] = level * np.float64(scales[row, group])
    return numbers


def compressed(
    bits: int,
    *,
    group: int | str,
    packed: bool = True,
    symmetric: bool = True,
    dtype: Any = ml_dtypes.bfloat16,
    plain_zero_points: bool = False,
    order: bool = False,
) -> Packer:
    """Integers by compressed-tensors.

    Args:
      bits: of a number.
      group: columns, "channel" or "tensor".
      packed: in words, or in bytes.
      symmetric: without zero points.
      dtype: of scales.
      plain_zero_points: zero points as bytes, though numbers are packed.
      order: columns are of groups in any order.
    """

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
        out, columns = shape
        size = group if isinstance(group, int) else columns
        count = -(-columns // size)
        group_of = [column // size for column in range(columns)]
        if order:
            group_of = [int(x) for x in rng.permutation(group_of)]
        least = -(2 ** (bits - 1))
        levels = rng.integers(least, -least, shape)
        rows = 1 if group == "tensor" else out
        scales = random_scales(rng, (rows, count), dtype, -least)
        zero_points = np.zeros((rows, count), np.int64)
        if not symmetric:
            zero_points = rng.integers(least, -least, (rows, count))
        every_row = [np.repeat(x, out // rows, axis=0) for x in (zero_points, scales)]
        numbers = integer_numbers(levels, *every_row, group_of)
        parts: Parts = {"weight_scale": scales[0] if group == "tensor" else scales}
        if packed:
            parts["weight_packed"] = word_rows(levels - least, bits)
            parts["weight_shape"] = np.array(shape, np.int64)
        else:
            parts["weight"] = levels.astype(np.int8)
        if not symmetric and packed and not plain_zero_points and group != "tensor":
            parts["weight_zero_point"] = word_rows(zero_points.T - least, bits).T
        elif not symmetric:
            parts["weight_zero_point"] = zero_points.reshape(parts["weight_scale"].shape)
            parts["weight_zero_point"] = parts["weight_zero_point"].astype(np.int8)
        if order:
            parts["weight_g_idx"] = np.array(group_of, np.int32)
        return parts, numbers

    return pack


def gptq(
    bits: int,
    *,
    group: int | None,
    symmetric: bool = False,
    less_one: bool = True,
    order: bool = False,
    dtype: Any = np.float16,
    with_groups: bool = True,
) -> Packer:
    """Integers by GPTQ.

    Args:
      bits: of a number.
      group: columns; None: all.
      symmetric: all zero points are in the middle.
      less_one: zero points are stored less one.
      order: columns are of groups in any order.
      dtype: of scales.
      with_groups: with a `g_idx`.
    """

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
        out, columns = shape
        size = group or columns
        count = -(-columns // size)
        group_of = [column // size for column in range(columns)]
        if order:
            group_of = [int(x) for x in rng.permutation(group_of)]
        levels = rng.integers(0, 2**bits, shape)
        scales = random_scales(rng, (out, count), dtype, 2 ** (bits - 1))
        zero_points = rng.integers(0, 2**bits, (out, count))
        if symmetric:
            zero_points[:] = 2 ** (bits - 1)
        stored = (zero_points - less_one) % 2**bits
        parts = {
            "qweight": word_rows(levels, bits).T,
            "qzeros": word_rows(stored.T, bits),
            "scales": scales.T,
        }
        if with_groups:
            parts["g_idx"] = np.array(group_of, np.int32)
        return parts, integer_numbers(levels, zero_points, scales, group_of)

    return pack
