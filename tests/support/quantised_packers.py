"""Quantised matrices, packed by the formats' definitions: number by number, in loops.

Shares no code with what reads them. The numbers that a matrix stands for are computed in float64
and rounded to float32 once.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.quantised_folders import Packer, Parts


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


def awq(group: int | None, dtype: Any = np.float16) -> Packer:
    """Integers of 4 bits by AWQ, in groups of columns; None: all."""
    place_of_column = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}

    def by_eights(numbers: np.ndarray) -> np.ndarray:
        mixed = np.empty_like(numbers)
        for column in range(numbers.shape[1]):
            start, within = divmod(column, 8)
            mixed[:, 8 * start + place_of_column[within]] = numbers[:, column]
        return word_rows(mixed, 4)

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
        out, columns = shape
        size = group or columns
        count = -(-columns // size)
        levels = rng.integers(0, 16, shape)
        scales = random_scales(rng, (out, count), dtype, 8)
        zero_points = rng.integers(0, 16, (out, count))
        parts = {
            "qweight": by_eights(levels.T),
            "qzeros": by_eights(zero_points.T),
            "scales": scales.T,
        }
        group_of = [column // size for column in range(columns)]
        return parts, integer_numbers(levels, zero_points, scales, group_of)

    return pack
