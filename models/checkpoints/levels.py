"""Floats to levels: `quantise` of models.formats' own formats, and what formats have in common.

By NumPy: matrices are quantised in the host's memory, as they are read.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from models.formats import WeightFormat
from models.quantised import QuantisedMatrix

Arrays = dict[str, Any]
"""The arrays of a quantised matrix by their names, as `WeightFormat.arrays` describes them."""


def quantise(
    matrix: Shaped[np.ndarray, "out in"], format: WeightFormat
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Round each number to the nearest level of its group.

    In 8 bits the largest number of a row has the level 127 or -127. In 4 bits the largest of a
    group has the level -8, whatever its sign: so all 16 levels are used. A level is at most half a
    scale from its number, but for those of 4 bits between 7 and 8: at most a scale.

    A group of zeros has a scale of zero. One that holds NaN or infinity has a scale that is not
    finite.

    Args:
      matrix: any floats.
      format: `formats.INT8`, or 4 bits with a scale alone.
    """
    numbers = np.asarray(matrix, np.float32)
    with np.errstate(all="ignore"):
        if format.group is None:
            scales = np.abs(numbers).max(axis=-1, keepdims=True) * np.float32(1 / 127)
            levels = np.clip(np.rint(numbers / _divisors(scales)), -127, 127)
            return {"levels": levels.astype(np.int8), "scales": scales}
        given, sizes = numbers, format.arrays(matrix.shape)
        groups, dtype = sizes["scales"][0][-1], sizes["scales"][1]
        numbers = np.zeros((len(given), groups * format.group), np.float32)
        numbers[:, : given.shape[-1]] = given
        numbers = numbers.reshape(len(given), groups, format.group)
        place = np.abs(numbers).argmax(axis=-1, keepdims=True)
        scales = (np.take_along_axis(numbers, place, axis=-1) / -8).astype(dtype)
        levels = np.clip(np.rint(numbers / _divisors(scales.astype(np.float32))), -8, 7)
        return {"levels": pack(levels.astype(np.int8) + 8), "scales": scales[..., 0]}


def quantised(
    matrices: Shaped[np.ndarray, "*lead out in"], format: WeightFormat
) -> QuantisedMatrix:
    """Quantise a matrix, or a stack of them, that is in the host's memory; see `quantise`.

    The new matrix stands for floats of the same dtype, and lies on JAX's default device.
    """
    rows = matrices.reshape(-1, matrices.shape[-1])
    arrays = {
        name: jax.device_put(array.reshape(*matrices.shape[:-1], -1))
        for name, array in quantise(rows, format).items()
    }
    return QuantisedMatrix(**arrays, columns=matrices.shape[-1], dtype=matrices.dtype)


def pack(
    levels: Shaped[np.ndarray, "out groups group"],
) -> Shaped[np.ndarray, "out half_width"]:
    """Put two levels of 0 to 15 in a byte: of each group the first half in the lower bits."""
    low, high = np.split(levels.astype(np.uint8), 2, axis=-1)
    return (low | high << 4).reshape(len(levels), -1)


def unpack(
    packed: Shaped[np.ndarray, "out half_width"], group: int
) -> Shaped[np.ndarray, "out groups group"]:
    """Return what `pack` was given."""
    grouped = packed.reshape(len(packed), -1, group // 2)
    return np.concatenate([grouped & 15, grouped >> 4], axis=-1).astype(np.int8)


def converted(arrays: Arrays, own: WeightFormat, wanted: WeightFormat) -> Arrays:
    """Return the arrays of a matrix in another format that holds all its numbers exactly.

    Args:
      arrays: the matrix, in the format `own`.
      own: a format in groups.
      wanted: `formats.common_format` of this format and others.
    """
    if own == wanted:
        return arrays
    assert own.group is not None
    assert wanted.group is not None
    made = dict(arrays)
    if wanted.bits == 8 and own.bits == 4:
        levels = unpack(arrays["levels"], own.group) - (0 if own.minima else 8)
        made["levels"] = levels.reshape(len(levels), -1).astype(np.int8)
    for name, factors in (("scales", "scale_factors"), ("minima", "minimum_factors")):
        if name not in arrays:
            continue
        if own.block is not None and wanted.block is None:
            each = np.repeat(made.pop(factors).astype(np.float32), own.block // own.group, axis=-1)
            made[name] = made[name] * each
        made[name] = np.repeat(made[name], own.group // wanted.group, axis=-1)
    if wanted.minima and not own.minima:
        made["minima"] = np.zeros_like(made["scales"])
        if wanted.block is not None:
            made["minimum_factors"] = np.zeros_like(made["scale_factors"])
    return made


def _divisors(scales: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return np.where(scales == 0, np.float32(1), scales)
