"""Matrices of floats of 8 bits with scales: the quant_method "fp8" of a config.json.

A number is its float times the scale, of a block, a row or the whole matrix. `weight_scale_inv` is
multiplied too, whatever its name says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.checkpoints.hf_layout import SCALES, Part, Tensors, part
from models.checkpoints.hf_settings import block_size
from models.checkpoints.scaled_matrix import ScaledMatrix
from models.checkpoints.tensor_files import FLOATS_OF_8_BITS
from models.formats import WeightFormat
from models.parameters import Shape

_NAMES = ("weight_scale_inv", "weight_scale")
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Method:
    """Floats of 8 bits, and scales.

    Attributes:
      block: rows and columns that share a scale; None: a row's, or the matrix's.
      either: whether the config leaves open which of both it is.
    """

    block: tuple[int, int] | None
    either: bool = False

    suffixes = _NAMES

    @property
    def said(self) -> str:
        """What the matrices are."""
        if self.block is None or self.either:
            return "fp8"
        return f"fp8 in blocks of {self.block[0]} by {self.block[1]}"

    def layout(self, module: str) -> "Fp8Method":
        """Give the layout, which is the same for all modules."""
        return self

    def parts(self, shape: Shape, given: Mapping[str, str]) -> dict[str, Part]:
        """Give the floats and their scales; see `hf_layout.Layout`."""
        shapes: list[Shape] = []
        if self.block is not None:
            shapes.append(block_shape(shape, self.block))
        if self.block is None or self.either:
            shapes += [(), (1,), (1, 1), (shape[0], 1), (shape[0],)]
        scale = next((name for name in _NAMES if name in given), _NAMES[0])
        return {
            "weight": part(shape, dtypes=tuple(FLOATS_OF_8_BITS)),
            scale: part(*shapes, dtypes=SCALES),
        }

    def format(self, shape: Shape, given: Mapping[str, str]) -> WeightFormat | None:
        """None: no product takes floats of 8 bits."""
        return None

    def read(self, shape: Shape, tensors: Tensors, levels: bool) -> ScaledMatrix:
        """Take the tensors apart; see `hf_layout.Layout`."""
        scales = next(tensors[name] for name in _NAMES if name in tensors)
        return scaled_floats(tensors["weight"], scales, self.block)


def fp8_method(settings: Mapping[str, Any]) -> Fp8Method:
    """Read the settings of a config.json.

    Raises:
      InputError: a size of blocks that makes no sense.
    """
    block = settings.get("weight_block_size")
    if block is None:
        # DeepSeek's block where nothing is said, but null says that there are none.
        said = "weight_block_size" in settings
        return Fp8Method(None if said else _USUAL_BLOCK, either=not said)
    return Fp8Method(block_size(block, "weight_block_size"))


def block_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """Return the shape of the scales of blocks, the last of which may be smaller."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def scaled_floats(
    weight: np.ndarray, scales: np.ndarray, block: tuple[int, int] | None
) -> ScaledMatrix:
    """Put floats and scales together.

    Args:
      weight: ``[out, in]``.
      scales: of blocks, of rows or of the matrix, as the shape says.
      block: its size, if there may be blocks.
    """
    out, columns = weight.shape
    if block is not None and scales.shape == block_shape(weight.shape, block):
        return ScaledMatrix(weight, scales, block[1], rows=block[0])
    rows = 1 if scales.size == out else out
    return ScaledMatrix(weight, scales.reshape(-1, 1), columns, rows=rows)
