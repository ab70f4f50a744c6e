"""How the numbers of a matrix are kept in 8 or 4 bits, and the bytes that this takes.

A format says nothing of any number: bytes are counted, and arrays are made, before one is read.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from models.config import ModelConfig
from models.parameters import Path, Shape, parameter_shapes

_DTYPES = {"bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class WeightFormat:
    """How the rows of a matrix are kept: levels in groups, and what each group shares.

    A number is its level times the group's scale, plus the group's minimum if the format has
    minima. A scale, or a minimum, is one number; with a `block` it is a small whole number times a
    factor that `block` numbers of the row share, as of GGUF's K-quants.

    Attributes:
      bits: 8, or 4: two levels a byte.
      group: numbers of a row that share a scale; None: the whole row, a channel.
      scale: dtype of scales and minima: a float, or int8 with a `block`.
      block: numbers of a row that share a float16 factor of the scales, and one of the minima; None
        without factors.
      minima: whether groups have a minimum. Levels of 4 bits are -8 to 7 without it, 0 to 15 with.
    """

    bits: int
    group: int | None
    scale: str
    block: int | None = None
    minima: bool = False

    def __post_init__(self) -> None:
        if self.bits == 4 and (self.group is None or self.group % 2):
            raise ValueError(f"4 bits need groups of an even size, not {self.group}")

    def arrays(self, shape: Shape) -> dict[str, tuple[Shape, np.dtype[Any]]]:
        """Give shape and dtype of each array, by its name, that holds a matrix of `shape`.

        Args:
          shape: ``[..., out, in]``. Rows that no whole number of groups fills are padded.
        """
        *lead, columns = shape
        group = self.group or columns
        groups = -(-columns // group)
        width = groups * group
        levels = (width, np.int8) if self.bits == 8 else (width // 2, np.uint8)
        made: dict[str, tuple[int, Any]] = {"levels": levels, "scales": (groups, self.scale)}
        if self.minima:
            made["minima"] = groups, self.scale
        if self.block is not None:
            blocks = -(-width // self.block), np.float16
            made["scale_factors"] = blocks
            if self.minima:
                made["minimum_factors"] = blocks
        return {
            name: ((*lead, size), np.dtype(_DTYPES.get(kind, kind)))
            for name, (size, kind) in made.items()
        }

    def nbytes(self, shape: Shape) -> int:
        """Count the bytes of a matrix of `shape`, ``[..., out, in]``."""
        return sum(math.prod(size) * kind.itemsize for size, kind in self.arrays(shape).values())


Formats = Mapping[Path, WeightFormat]
"""The formats of parameters by their paths; those that are not named are floats."""

INT8 = WeightFormat(8, None, "float32")
INT4 = WeightFormat(4, 32, "bfloat16")


def matrices(config: ModelConfig) -> list[Path]:
    """List the parameters that are matrices: of the layers, embedding and unembedding."""
    return [path for path, shape in parameter_shapes(config).items() if is_matrix(path, shape)]


def is_matrix(path: Path, shape: Shape) -> bool:
    """Whether a parameter, or a stack of layers' parameters, is of matrices; norms are not."""
    return len(shape) - (path[0] == "layers") == 2


def formats_of_dtype(config: ModelConfig, weight_dtype: str) -> dict[Path, WeightFormat]:
    """Give the formats that "int8" and "int4" stand for; none for "model".

    By "int4" the embedding and the unembedding are in int8: few of a large model's numbers, and
    those that matter most.
    """
    if weight_dtype == "model":
        return {}
    layers = {"int8": INT8, "int4": INT4}[weight_dtype]
    return {path: layers if path[0] == "layers" else INT8 for path in matrices(config)}


def common_format(formats: Iterable[WeightFormat]) -> WeightFormat:
    """Return a format that holds the numbers of matrices of several exactly, to be one stack."""

    def of_two(one: WeightFormat, other: WeightFormat) -> WeightFormat:
        if one == other:
            return one
        assert one.group is not None  # of a channel there is one format, `INT8`
        assert other.group is not None
        alike = one.scale == other.scale and one.block == other.block
        packed = one.bits == other.bits == 4 and one.group == other.group
        return WeightFormat(
            bits=4 if packed and one.minima == other.minima else 8,
            group=math.gcd(one.group, other.group),
            scale=one.scale if alike else "float32",
            block=one.block if alike else None,
            minima=one.minima or other.minima,
        )

    return functools.reduce(of_two, formats)


def bits_each(config: ModelConfig, nbytes: int) -> float:
    """Return the bits that each of a model's numbers takes on average, of all their bytes."""
    return 8 * nbytes / sum(map(math.prod, parameter_shapes(config).values()))


def bytes_by_parameter(
    config: ModelConfig, itemsize: int, formats: Formats | None = None
) -> dict[Path, int]:
    """Count the bytes of each parameter: `itemsize` a number where `formats` has no other."""
    formats = formats or {}
    return {
        path: formats[path].nbytes(shape) if path in formats else math.prod(shape) * itemsize
        for path, shape in parameter_shapes(config).items()
    }
