"""A block of bytes of some rows: which groups and columns it has, and the numbers of its levels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels import backend as plt
from pallas_kernels.levels import MIDDLE, Levels
from pallas_kernels.multiply_levels import _registers
from pallas_kernels.toolbox import launch


class Block(NamedTuple):
    """A block of bytes.

    Attributes:
        matrix: of refs, ``[out, ...]``.
        rows: `[rows, 1]` int32, numbers of its rows.
        number: of the block, counted from a row's begin.
        size: bytes of a row in it.
    """

    matrix: Levels
    rows: Any
    number: Any
    size: int

    def levels(self) -> Any:
        """Load the bytes: `[rows, size]`; zeros past the rows' end."""
        width = self.matrix.levels.shape[1]
        byte = self.number * self.size + jnp.arange(self.size)
        return self._load(self.matrix.levels, byte, width % self.size == 0, byte < width)

    def factors(self) -> list[Any]:
        """Load the factors of scales and of minima: `[rows, groups]`, or one of all, `[rows, 1]`.

        None in the place of those that are not there.
        """
        return [
            None if ref is None else self._factors(ref)
            for ref in (self.matrix.scale_factors, self.matrix.minimum_factors)
        ]

    def columns(self, half: int) -> Any:
        """Find the columns of the bytes' lower levels, half 0, or of their upper ones: `[size]`."""
        # Not by // and %: of lax's remainders, Triton sees which numbers follow each other.
        byte, run = jnp.arange(self.size), bytes_of_group(self.matrix)
        if self.matrix.bits == 8:
            return self.number * self.size + byte
        if run > self.size:
            return (self.number * self.size + (self._first() + half) * run) + byte
        group, rest = lax.div(byte, jnp.int32(run)), lax.rem(byte, jnp.int32(run))
        return (self.number * (2 * self.size) + half * run) + (group * (2 * run) + rest)

    def numbers(
        self, levels: Any, factors: list[Any], dtype: Any, *, pairs: bool, interpret: bool
    ) -> list[Any]:
        """Dequantise: `[rows, size]` in `dtype`, of each byte's one level, or lower and upper one.

        Args:
            levels: of `levels`.
            factors: of `factors`.
            dtype: of the numbers.
            pairs: see `Config`.
            interpret: whether the kernel is interpreted.
        """
        scale = self._per_group(self.matrix.scales, factors[0])
        least = None
        if self.matrix.minima is not None:
            least = self._per_group(self.matrix.minima, factors[1])
        by_assembly = self.matrix.bits == 4 and launch.takes_assembly(interpret)
        if by_assembly and pairs and dtype != jnp.float32:
            rounded = [None if x is None else self._spread(x.astype(dtype)) for x in (scale, least)]
            return _registers.in_pairs(levels, *rounded)
        found = _registers.biased(levels) if by_assembly else _registers.plain(levels)
        bias = _registers.BIAS if by_assembly else 0
        if self.matrix.bits == 4 and self.matrix.minima is None:
            bias += MIDDLE
        if bias:
            least = -bias * scale + (0 if least is None else least)
        found = [numbers * self._spread(scale) for numbers in found]
        if least is not None:
            found = [numbers + self._spread(least) for numbers in found]
        return [numbers.astype(dtype) for numbers in found]

    def _count(self) -> int:
        """Count the groups; one may be of several blocks."""
        return max(1, self.size // bytes_of_group(self.matrix))

    def _first(self) -> Any:
        """Return the number of the first group."""
        run = bytes_of_group(self.matrix)
        if run > self.size:
            return lax.div(self.number, jnp.int32(run // self.size))
        return self.number * (self.size // run)

    def _per_group(self, small: Any, factor: Any) -> Any:
        """Load scales or minima, and multiply them by their factors: float32 `[rows, groups]`."""
        group, groups = self._first() + jnp.arange(self._count()), small.shape[1]
        wide = self._load(small, group, groups % self._count() == 0, group < groups)
        wide = wide.astype(jnp.float32)
        return wide if factor is None else wide * factor.astype(jnp.float32)

    def _factors(self, ref: Any) -> Any:
        groups = self.matrix.scales.shape[1]
        shared = jnp.int32(groups // ref.shape[1])
        if groups // ref.shape[1] % self._count() == 0:
            place = lax.div(self._first(), shared) + jnp.arange(1)
            return self._load(ref, place, True, None)
        group = self._first() + jnp.arange(self._count())
        return self._load(ref, lax.div(group, shared), groups % self._count() == 0, group < groups)

    def _load(self, ref: Any, column: Any, all_exist: bool, exists: Any) -> Any:
        """Load `[rows, columns]` of an array; zeros where none exists."""
        at = ref.at[self.rows, column[None, :]]
        return plt.load(at) if all_exist else plt.load(at, mask=exists[None, :], other=0)

    def _spread(self, x: Any) -> Any:
        """Give each byte its group's number: `[rows, groups]` to `[rows, size]`."""
        rows, groups = x.shape
        each = (rows, groups, self.size // groups)
        return jnp.broadcast_to(x[:, :, None], each).reshape(rows, self.size)


def bytes_of_group(matrix: Levels) -> int:
    """Count the bytes of a row that a group's levels take."""
    return matrix.group * matrix.bits // 8
