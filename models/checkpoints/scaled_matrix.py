"""A matrix as small numbers and scales: its floats, and its levels in a format of ours.

What quantised Hugging Face folders hold comes to this, however they pack it. By NumPy: matrices are
taken apart in the host's memory, as they are read.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Integer, Shaped, UInt8

from models.checkpoints.levels import Arrays, pack
from models.formats import WeightFormat

_AT_ONCE = 2**22  # numbers whose scales are spread out


@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """A matrix ``[out, in]``, of which a number is ``(level - zero point) * scale``.

    Attributes:
      levels: ``[out, in]``: uint8, int8, or floats of 8 bits.
      scales: ``[out, groups]`` floats; ``[row_blocks, groups]`` where several rows share them; or
        ``[1, 1]``, for all.
      groups: columns of each group, where groups follow each other, the last of which may be
        smaller; or int ``[in]``, the group of each column.
      zero_points: whole numbers, ``[out, groups]`` or ``[1, 1]``; or one, for all.
      rows: rows that share a scale.
    """

    levels: Shaped[np.ndarray, "out in"]
    scales: Float[np.ndarray, "row_blocks groups"]
    groups: int | Int[np.ndarray, "in"]
    zero_points: Integer[np.ndarray, "rows_of_zeros groups"] | int = 0
    rows: int = 1

    def floats(self) -> Float[np.ndarray, "out in"]:
        """Return the numbers, computed in float32."""
        out, columns = self.levels.shape
        made = np.empty((out, columns), np.float32)
        row_block = np.arange(out) // self.rows
        scales = self.scales.astype(np.float32)
        scales = np.broadcast_to(scales, (-(-out // self.rows), scales.shape[-1]))
        zero_points = self.zero_points
        if isinstance(zero_points, np.ndarray):
            zero_points = np.broadcast_to(zero_points, (out, zero_points.shape[-1]))
        rows = max(1, _AT_ONCE // max(columns, 1))
        for start in range(0, out, rows):
            block = slice(start, start + rows)
            numbers = np.ascontiguousarray(self.levels[block]).astype(np.float32)
            if isinstance(zero_points, np.ndarray):
                numbers -= self._each_column(zero_points[block].astype(np.float32))
            elif zero_points:
                numbers -= np.float32(zero_points)
            with np.errstate(over="ignore", invalid="ignore"):
                of_rows = self._each_column(scales[row_block[block]])
                np.multiply(numbers, of_rows, out=made[block])
        return made

    def arrays(self, format: WeightFormat) -> Arrays:
        """Return the arrays of the matrix in a format that `int_format` gives.

        Levels and zero points are exact. So are scales; and minima, which are zero points times
        scales, unless scales are float32: then they are rounded to float32.
        """
        out, columns = self.levels.shape
        sizes = format.arrays((out, columns))
        groups = sizes["scales"][0][-1]
        scales = np.broadcast_to(self.scales.astype(np.float32), (out, groups))
        least = 0 if self.levels.dtype == np.uint8 else -(2 ** (format.bits - 1))
        # The first level of ours: minima go with 0 to 15 or -128 to 127, scales alone with -8 to 7.
        first = 0 if format.minima and format.bits == 4 else -(2 ** (format.bits - 1))
        made: Arrays = {"scales": scales.astype(sizes["scales"][1])}
        levels = self.levels.astype(np.int16)
        if format.minima:
            zero_points = np.broadcast_to(np.asarray(self.zero_points, np.int16), (out, groups))
            levels += first - least
            with np.errstate(invalid="ignore"):  # what is not finite is refused by name
                made["minima"] = (least - first - zero_points).astype(np.float32) * scales
        else:
            assert isinstance(self.zero_points, int)
            levels -= self.zero_points
        width = groups * (format.group or columns)
        padded = np.zeros((out, width), np.int8)
        padded[:, :columns] = levels
        if format.bits == 8:
            return made | {"levels": padded}
        grouped = padded.reshape(out, groups, -1)
        return made | {"levels": pack(grouped if format.minima else grouped + 8)}

    def _each_column(self, of_groups: np.ndarray) -> np.ndarray:
        """Spread what groups have over their columns."""
        if isinstance(self.groups, np.ndarray):
            return of_groups[:, self.groups]
        return np.repeat(of_groups, self.groups, axis=-1)[:, : self.levels.shape[-1]]


def int_format(
    bits: int, group: int | None, columns: int, scale: str, zero_points: bool
) -> WeightFormat | None:
    """Give the format that keeps integers with scales of groups; None if there is none.

    Args:
      bits: 4 or 8.
      group: columns that share a scale; None: all of them, or the whole matrix.
      columns: of the matrix.
      scale: dtype of the scales in the file.
      zero_points: whether each group has one. Scales and minima are float32 then, so that a minimum
        can be a product of both.
    """
    group = columns if group is None else min(group, columns)
    if bits == 8 and group == columns:
        return WeightFormat(8, None, "float32", minima=zero_points)
    if bits == 4 and group % 2:
        return None
    return WeightFormat(bits, group, "float32" if zero_points else scale, minima=zero_points)


def unpack_words(
    words: Int[np.ndarray, "rows words"], bits: int
) -> UInt8[np.ndarray, "rows columns"]:
    """Take int32 words apart, along the last axis, into numbers of 4 or 8 bits, lowest first."""
    parts = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 4:
        parts = np.stack([parts & 15, parts >> 4], axis=-1)
    return parts.reshape(len(words), -1)


def unpack_rows(
    words: Int[np.ndarray, "words columns"], order: tuple[int, ...]
) -> UInt8[np.ndarray, "rows columns"]:
    """Take int32 words apart, along the first axis, into eight numbers of 4 bits each.

    Args:
      words: of the numbers of eight rows each.
      order: which of its rows a word's number is of, from the lowest bits on.
    """
    made = np.empty((8 * len(words), words.shape[-1]), np.uint8)
    words = np.ascontiguousarray(words)
    for place, row in enumerate(order):
        made[row::8] = words >> 4 * place & 15
    return made


def scale_dtype(name: str) -> str:
    """Return NumPy's or ml_dtypes' name of a float dtype that safetensors names so."""
    return _SCALES[name]


_SCALES: dict[str, Any] = {
    "F16": np.dtype(np.float16).name,
    "BF16": np.dtype(ml_dtypes.bfloat16).name,
    "F32": np.dtype(np.float32).name,
}
