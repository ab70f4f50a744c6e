"""Matrices by compressed-tensors: integers of 4 or 8 bits, packed or not, and floats of 8 bits.

The layout is that of compressed-tensors' compressors pack_quantized and naive_quantized. Packed
numbers lie along a row, from a word's lowest bits on, 2^(bits - 1) added to each; packed zero
points lie so along the rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.checkpoints.hf_fp8 import block_shape, scaled_floats
from models.checkpoints.hf_layout import SCALES, Part, Tensors, checked_groups, part
from models.checkpoints.scaled_matrix import (
    ScaledMatrix,
    int_format,
    scale_dtype,
    unpack_words,
)
from models.errors import InputError
from models.formats import WeightFormat
from models.parameters import Shape

_INTEGERS = ("I32", "I64")
_SCALE, _ZERO, _GROUPS = "weight_scale", "weight_zero_point", "weight_g_idx"


@dataclass(frozen=True)
class CompressedLayout:
    """How one matrix is compressed.

    Attributes:
      bits: of a number: 4 or 8.
      is_float: whether it is a float, of 8 bits.
      packed: whether 32-bit words hold the numbers.
      strategy: what shares a scale: "tensor", "channel", "group" or "block".
      group: columns of a group, by that strategy.
      block: rows and columns of a block, by that strategy.
      symmetric: whether there are no zero points.
      ordered: whether groups follow each other where the file names none.
    """

    bits: int
    is_float: bool
    packed: bool
    strategy: str
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    ordered: bool = True

    @property
    def said(self) -> str:
        """What the matrix is, for people."""
        shared = {
            "tensor": "with one scale",
            "channel": "with a scale a channel",
            "group": f"in groups of {self.group}",
        }
        if self.block is not None:
            shared["block"] = f"in blocks of {self.block[0]} by {self.block[1]}"
        kind = "fp8" if self.is_float else f"int{self.bits}"
        return f"compressed-tensors {kind} {shared[self.strategy]}"

    def parts(self, shape: Shape, given: Mapping[str, str]) -> dict[str, Part]:
        """Give the numbers, scales, zero points and groups; see `hf_layout.Layout`."""
        out = shape[0]
        if self.packed:
            words = out, _words(shape[1], self.bits)
            parts = {
                "weight_packed": part(words, dtypes=("I32",)),
                "weight_shape": part((2,), dtypes=_INTEGERS),
            }
        else:
            parts = {"weight": part(shape, dtypes=("F8_E4M3",) if self.is_float else ("I8",))}
        scales = self._scale_shapes(shape)
        parts[_SCALE] = part(*scales, dtypes=SCALES)
        if not self.is_float:
            zero_points = tuple((size, ("I8",)) for size in scales)
            if self.packed and self.strategy in ("group", "channel"):
                size = _words(out, self.bits), scales[0][-1]
                zero_points = ((size, ("I32",)), *zero_points)
            # Some programs write the zeros of symmetric matrices.
            parts[_ZERO] = Part(zero_points, optional=self.symmetric)
        if self.strategy == "group":
            parts[_GROUPS] = part((shape[1],), dtypes=_INTEGERS, optional=self.ordered)
        return parts

    def format(self, shape: Shape, given: Mapping[str, str]) -> WeightFormat | None:
        """Give the format of integers in groups that follow each other; see `hf_layout.Layout`."""
        if self.is_float or self.strategy == "block" or _GROUPS in given:
            return None
        # What fills bytes in the file may be any integer of 8 bits.
        bits = self.bits if self.packed else 8
        scale = scale_dtype(given[_SCALE])
        return int_format(bits, self.group, shape[1], scale, not self.symmetric)

    def read(self, shape: Shape, tensors: Tensors, levels: bool) -> ScaledMatrix:
        """Take the tensors apart; see `hf_layout.Layout`."""
        out, columns = shape
        scales = tensors[_SCALE]
        if self.is_float:
            return scaled_floats(tensors["weight"], scales, self.block)
        if self.packed:
            stated = tuple(tensors["weight_shape"].tolist())
            if stated != shape:
                raise InputError(f"has the shape {shape}, but its weight_shape says {stated}")
            numbers = unpack_words(tensors["weight_packed"], self.bits)[:, :columns]
        else:
            numbers = tensors["weight"]
        middle = 2 ** (self.bits - 1) if self.packed else 0
        rows = 1
        if self.block is not None:
            rows, group = self.block
            groups: int | np.ndarray = group
        else:
            scales = scales.reshape(-1, 1) if self.strategy != "group" else scales
            groups = self._groups(columns, scales.shape[-1], tensors.get(_GROUPS))
        zero_points: np.ndarray | int = middle
        if _ZERO in tensors:
            found = _zero_points(tensors[_ZERO], self.bits, out, scales.shape[-1], middle)
            if not self.symmetric:
                zero_points = found
            elif (found != middle).any():
                raise InputError(
                    "has zero points, but config.json says symmetric: set it to false there"
                )
        return ScaledMatrix(numbers, scales, groups, zero_points, rows)

    def _scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        if self.block is not None:
            return (block_shape(shape, self.block),)
        if self.group is not None:
            return ((shape[0], math.ceil(shape[1] / self.group)),)
        if self.strategy == "channel":
            return (shape[0], 1), (shape[0],)
        return (1,), (), (1, 1)

    def _groups(self, columns: int, count: int, given: np.ndarray | None) -> int | np.ndarray:
        """Return the group of each column: as given, unless it is -1 for all of them."""
        if given is None or (given == -1).all():
            return self.group or columns
        if count > 1 and not given.any():
            raise InputError(
                f"has {count} groups, and {_GROUPS} names the first alone: which columns belong to "
                "which is not in the file; get it from its authors again"
            )
        return checked_groups(given, count, _GROUPS)


def _words(numbers: int, bits: int) -> int:
    return math.ceil(numbers * bits / 32)


def _zero_points(given: np.ndarray, bits: int, out: int, groups: int, middle: int) -> np.ndarray:
    """Return zero points ``[out, groups]`` or ``[1, 1]``, of numbers to which `middle` is added."""
    if given.dtype == np.int32:
        return unpack_words(np.ascontiguousarray(given.T), bits)[:, :out].T
    return given.reshape(-1, groups).astype(np.int16) + np.int16(middle)
