"""The estimate by a pooled covariance, in a program of the kernel; `_pooled.py` is its meaning."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._pooled import ABOVE, MOST_GONE, logit_deviation
from pallas_kernels.attend_zones._rest import MOST_MASS
from pallas_kernels.numerics import LOG2_E


class PooledShape:
    """What one program's query heads make of the covariance of a row, `[g]`; and its clusters."""

    def __init__(self, program: Any) -> None:
        """Ask for the query and its product; `measure` is when they must be there."""
        self.program, self.deviations = program, program.refs.deviations
        self.query, self.towards = program.load_query(), self._product(0)

    def measure(self) -> None:
        """Find the deviation of the query's logits where a cluster's is 1, `[g]`."""
        self.length = logit_deviation(self.query, self.towards, scale=self.program.scale)
        self.half_square = 0.5 * self.length * self.length

    def load(self, clusters: Array, mask: Array) -> Array:
        """Load a tile's deviations `[n]`; what is masked is zero."""
        at = self.deviations.at[*self.program.row, clusters]
        return plt.load(at, mask=mask, other=0).astype(jnp.float32)

    def weigh(
        self, exponents: Array, deviations: Array, sizes: Array, left: Array
    ) -> tuple[Array, Array]:
        """Weigh a tile of clusters.

        Args:
            exponents: `[g, n]`, binary logarithms of the masses of members at their means.
            deviations: `[n]`; anything where none are left.
            sizes, left: `[n]` int32.

        Returns:
            the clusters' masses `[g, n]`, and what multiplies the vector of `add`.
        """
        keeps = left > 0
        # What is of clusters alone, before anything is of query heads too; by one division.
        members, n = left.astype(jnp.float32), sizes.astype(jnp.float32)
        others = jnp.maximum(n - 1, 1)
        each = 1 / (jnp.maximum(members, 1) * others)
        deviations = jnp.where(keeps, deviations, 0)
        share = jnp.maximum((members - 1) * n * each, 0) * deviations * deviations
        gone = jnp.minimum((n - members) * others * each, MOST_GONE)
        lower = (ABOVE * LOG2_E) * deviations * gone
        members = jnp.where(keeps, members, 0)
        first = jnp.exp2(exponents - self.length[:, None] * lower[None, :]) * members[None, :]
        more = self.half_square[:, None] * share[None, :]
        more = jnp.where(more > MOST_MASS, MOST_MASS, more)
        return first + first * more, first * share[None, :]

    def add(self, output: Array, along: Array) -> Array:
        """Add to an output `[g, d]` what the clusters' values have along their keys.

        Args:
            output: the sum of mean values by mass.
            along: `[g, n]`, the sums of what `weigh` returns.
        """
        return output + jnp.sum(along, axis=1)[:, None] * self._product(1)

    def _product(self, which: int) -> Array:
        """Load the query's product `[g, d]` with a matrix, zero outside the group and the head."""
        program = self.program
        at = program.refs.products.at[
            program.b, program.h, program.g[:, None], jnp.int32(which), program.d
        ]
        return plt.load(at, mask=program.of_rows(program.in_group), other=0)
