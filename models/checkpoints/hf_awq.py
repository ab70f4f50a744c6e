"""Matrices by AWQ: integers of 4 bits in words along a row of the transposed matrix.

The layout is that of AutoAWQ's version "gemm": `qweight` is ``[in, out / 8]`` words, `qzeros`
``[groups, out / 8]``, `scales` ``[groups, out]``. From its lowest bits on, a word holds the columns
0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.checkpoints.hf_layout import SCALES, Part, Tensors, part
from models.checkpoints.hf_settings import bits_of, group_size, not_read
from models.checkpoints.scaled_matrix import (
    ScaledMatrix,
    int_format,
    scale_dtype,
    unpack_rows,
)
from models.errors import InputError
from models.formats import WeightFormat
from models.parameters import Shape

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqMethod:
    """The settings of a config.json.

    Attributes:
      group: columns that share a scale and a zero point; None: all.
    """

    group: int | None

    suffixes = ("qweight", "qzeros", "scales")

    @property
    def said(self) -> str:
        """What the matrices are, for people."""
        sizes = "with a scale a channel" if self.group is None else f"in groups of {self.group}"
        return f"AWQ int4 {sizes}"

    def layout(self, module: str) -> "AwqMethod":
        """Give the layout, which is the same for all modules."""
        return self

    def parts(self, shape: Shape, given: Mapping[str, str]) -> dict[str, Part]:
        """Give the words, zero points and scales; see `hf_layout.Layout`."""
        out, columns = shape
        groups = 1 if self.group is None else math.ceil(columns / self.group)
        words = math.ceil(out / 8)
        return {
            "qweight": part((columns, words), dtypes=("I32",)),
            "qzeros": part((groups, words), dtypes=("I32",)),
            "scales": part((groups, out), dtypes=SCALES),
        }

    def format(self, shape: Shape, given: Mapping[str, str]) -> WeightFormat | None:
        """Give the format of integers with zero points; see `hf_layout.Layout`."""
        return int_format(4, self.group, shape[1], scale_dtype(given["scales"]), zero_points=True)

    def read(self, shape: Shape, tensors: Tensors, levels: bool) -> ScaledMatrix:
        """Take the tensors apart; see `hf_layout.Layout`."""
        out, columns = shape
        numbers = unpack_rows(tensors["qweight"].T, _ORDER)[:out]
        zero_points = unpack_rows(tensors["qzeros"].T, _ORDER)[:out]
        groups = self.group or columns
        return ScaledMatrix(numbers, tensors["scales"].T, groups, zero_points)


def awq_method(settings: Mapping[str, Any]) -> AwqMethod:
    """Read the settings of a config.json.

    Raises:
      InputError: a layout, or a number of bits, that is not read.
    """
    bits_of(settings, "AWQ", (4,))
    # AutoAWQ's name of it, transformers' and GPTQModel's.
    names = ("version", "format", "checkpoint_format")
    version = next((settings[name] for name in names if settings.get(name) is not None), "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(not_read(f"is AWQ of the version {version!r}", "gemm"))
    if settings.get("backend") == "llm-awq":
        raise InputError(not_read("is AWQ of the backend 'llm-awq'", "autoawq's files"))
    return AwqMethod(group_size(settings))
