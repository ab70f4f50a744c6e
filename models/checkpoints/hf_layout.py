"""What a reader of one way of quantising says: which tensors make a matrix, and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from models.checkpoints.scaled_matrix import ScaledMatrix
from models.errors import InputError
from models.formats import WeightFormat
from models.parameters import Shape

SCALES = ("F16", "BF16", "F32")
"""The dtypes that scales may have."""

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]
"""The tensors of one matrix by the last part of their names, such as ``qweight``."""


@dataclass(frozen=True)
class Part:
    """One of the tensors that make a matrix.

    Attributes:
      kinds: what it may be: a shape, and the dtypes that go with it.
      optional: whether it may be absent.
    """

    kinds: tuple[tuple[Shape, tuple[str, ...]], ...]
    optional: bool = False

    def takes(self, shape: Shape, dtype: str) -> bool:
        """Whether a tensor may be this part."""
        return any(shape == size and dtype in dtypes for size, dtypes in self.kinds)


def part(*shapes: Shape, dtypes: tuple[str, ...], optional: bool = False) -> Part:
    """Make a part that may have any of these shapes, and any of the dtypes with each."""
    return Part(tuple((shape, dtypes) for shape in shapes), optional)


@runtime_checkable
class Layout(Protocol):
    """How the tensors of one matrix hold it. Arguments named `shape` are the matrix's."""

    @property
    def said(self) -> str:
        """What the matrix is, for people: "GPTQ, 4 bits in groups of 128"."""
        ...

    def parts(self, shape: Shape, given: Mapping[str, str]) -> dict[str, Part]:
        """Give the tensors that the matrix needs, by the last part of their names.

        Args:
          shape: ``(out, in)``.
          given: dtypes of those that are there, by which a reader may choose between two.
        """
        ...

    def format(self, shape: Shape, given: Mapping[str, str]) -> WeightFormat | None:
        """Give the format that keeps the matrix's own levels; None: it can be floats only."""
        ...

    def read(self, shape: Shape, tensors: Tensors, levels: bool) -> ScaledMatrix:
        """Take the tensors apart.

        Args:
          shape: ``(out, in)``.
          tensors: those that are there.
          levels: whether the levels are to be kept in `format`: else the floats are what counts.

        Raises:
          InputError: numbers that contradict the config; the message goes on after a name.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A way of quantising, as a config.json states it."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Last parts of names that only tensors of quantised matrices have."""
        ...

    def layout(self, module: str) -> Layout:
        """Give the layout of a module's matrix; InputError where the config has none for it."""
        ...


def checked_groups(given: np.ndarray, count: int, name: str) -> np.ndarray:
    """Return the groups of columns; InputError where one is not among `count` groups."""
    if given.min() < 0 or given.max() >= count:
        raise InputError(
            f"has a {name} from {given.min()} to {given.max()}, but {count} groups: check the file"
        )
    return given.astype(np.int32)
