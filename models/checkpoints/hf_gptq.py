"""Matrices by GPTQ: integers of 4 or 8 bits in words along a column, each with its group.

The layout is that of AutoGPTQ's qlinear modules: `qweight` is ``[in / 8, out]`` words, `qzeros`
``[groups, out / 8]``, `scales` ``[groups, out]`` and `g_idx` ``[in]``, by 4 bits. Its first format
stores zero points less one, of which -1 is stored as the largest number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.checkpoints.hf_layout import SCALES, Part, Tensors, checked_groups, part
from models.checkpoints.hf_settings import bits_of, group_size, not_read, setting
from models.checkpoints.scaled_matrix import (
    ScaledMatrix,
    int_format,
    scale_dtype,
    unpack_words,
)
from models.errors import InputError
from models.formats import WeightFormat
from models.parameters import Shape

_FLOATS = "give `weight_dtype='model'` to read its floats"


@dataclass(frozen=True)
class GptqMethod:
    """The settings of a config.json.

    Attributes:
      bits: of a number: 4 or 8.
      group: columns that share a scale; None: all.
      symmetric: whether all zero points are in the middle.
      ordered: whether groups follow each other; else only `g_idx` knows them ("act-order").
      less_one: whether zero points are stored less one.
    """

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool
    less_one: bool

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def said(self) -> str:
        """What the matrices are, for people."""
        sizes = "with a scale a channel" if self.group is None else f"in groups of {self.group}"
        return f"GPTQ int{self.bits} {sizes}{'' if self.ordered else ' by act-order'}"

    def layout(self, module: str) -> "GptqMethod":
        """Give the layout, which is the same for all modules."""
        return self

    def parts(self, shape: Shape, given: Mapping[str, str]) -> dict[str, Part]:
        """Give the words, scales, zero points and groups; see `hf_layout.Layout`."""
        out, columns = shape
        groups = 1 if self.group is None else math.ceil(columns / self.group)
        return {
            "qweight": part((math.ceil(columns * self.bits / 32), out), dtypes=("I32",)),
            "qzeros": part((groups, math.ceil(out * self.bits / 32)), dtypes=("I32",)),
            "scales": part((groups, out), dtypes=SCALES),
            "g_idx": part((columns,), dtypes=("I32", "I64"), optional=self.ordered),
        }

    def format(self, shape: Shape, given: Mapping[str, str]) -> WeightFormat | None:
        """Give the format of integers in groups that follow each other; see `hf_layout.Layout`."""
        if not self.ordered:
            return None
        scale = scale_dtype(given["scales"])
        return int_format(self.bits, self.group, shape[1], scale, not self.symmetric)

    def read(self, shape: Shape, tensors: Tensors, levels: bool) -> ScaledMatrix:
        """Take the tensors apart; see `hf_layout.Layout`."""
        out, columns = shape
        numbers = unpack_words(np.ascontiguousarray(tensors["qweight"].T), self.bits)[:, :columns]
        stored = unpack_words(tensors["qzeros"], self.bits)[:, :out].T
        most = np.uint8(2**self.bits - 1)
        zero_points = (stored + np.uint8(1)) & most if self.less_one else stored
        if self.symmetric:
            self._check_label(stored)
        groups: int | np.ndarray = self.group or columns
        # Zeros alone stand for groups that follow each other, as ExLlama and AutoGPTQ take them.
        if "g_idx" in tensors and tensors["g_idx"].any():
            given = checked_groups(tensors["g_idx"], len(tensors["scales"]), "g_idx")
            in_order = np.arange(columns) // groups
            if (given != in_order).any():
                groups = given
            if levels and groups is given:
                raise InputError(
                    "has groups in another order than its columns (g_idx), but config.json says "
                    f"no desc_act: {_FLOATS}"
                )
        middle = 2 ** (self.bits - 1)
        if levels and self.symmetric:
            if (zero_points != middle).any():
                raise InputError(
                    f"has zero points other than {middle}, but config.json says sym: {_FLOATS}"
                )
            return ScaledMatrix(numbers, tensors["scales"].T, groups, middle)
        return ScaledMatrix(numbers, tensors["scales"].T, groups, zero_points)

    def _check_label(self, stored: np.ndarray) -> None:
        """Raise InputError where symmetric zero points are those of the other format."""
        middle = 2 ** (self.bits - 1)
        label, other = ("gptq", "gptq_v2") if self.less_one else ("gptq_v2", "gptq")
        if (stored == (middle if self.less_one else middle - 1)).all():
            raise InputError(
                f"has the zero points of the format {other}, but config.json says {label}: set "
                f"checkpoint_format to {other!r} there"
            )


def gptq_method(settings: Mapping[str, Any]) -> GptqMethod:
    """Read the settings of a config.json.

    Raises:
      InputError: a layout, or a number of bits, that is not read.
    """
    # The second is transformers' name of it.
    format = setting(settings, "checkpoint_format", setting(settings, "format", "gptq"))
    if format not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        name = "marlin" if settings.get("is_marlin_format") else format
        raise InputError(not_read(f"is GPTQ in the format {name!r}", "gptq and gptq_v2"))
    dynamic = settings.get("dynamic") or {}
    for module in dynamic if isinstance(dynamic, Mapping) else [dynamic]:
        # "-:" is of modules that are not quantised: their tensors' dtypes say so too.
        if not str(module).startswith("-:"):
            raise InputError(not_read(f"has settings of its own for {module!r} (dynamic)", "none"))
    return GptqMethod(
        bits=bits_of(settings, "GPTQ", (4, 8)),
        group=group_size(settings),
        symmetric=bool(setting(settings, "sym", True)),
        ordered=not setting(settings, "desc_act", False),
        less_one=format == "gptq",
    )
