"""A row's ranked clusters, as the kernels of `select_clusters` hand them on and see them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.toolbox.head_view import HeadView


class Drawn(NamedTuple):
    """A row's sample: keys and sizes `[batch, kv_heads, sample]`, uint32 and int32."""

    keys: Any
    sizes: Any


class RankedRefs(NamedTuple):
    """What all kernels after the first one read.

    Attributes:
        keys, sizes: from `_rank`.
        offsets, budget, layer: as `select_clusters` has them, int32.
    """

    keys: Any
    sizes: Any
    offsets: Any
    budget: Any
    layer: Any


class Ranked:
    """One row's ranked clusters, and how many tokens are to be taken of them."""

    def __init__(self, refs: RankedRefs, interpret: bool):
        row = HeadView(pl.program_id(1), refs.keys.shape[1], refs.layer[...], interpret=interpret)
        self.row, self.keys, self.sizes, self.offsets = row, refs.keys, refs.sizes, refs.offsets
        self.clusters = jnp.int32(refs.offsets.shape[-1] - 1)
        self.tokens = row.load(refs.offsets, self.clusters, stacked=True)
        self.budget = jnp.minimum(plt.load(refs.budget.at[row.b]), self.tokens)

    def none_from(self, cluster: int) -> Any:
        """Whether neither this cluster nor one behind it is in use."""
        first = jnp.minimum(jnp.int32(cluster), self.clusters)
        return self.row.load(self.offsets, first, stacked=True) == self.tokens

    def element(self, c: Any) -> tuple[Any, Any, Any]:
        """Clusters' keys, weights and places."""
        return *self.load(c, c < self.clusters), c

    def load(self, c: Any, exists: Any) -> tuple[Any, Any]:
        exists = exists & (c < self.clusters)
        return self.row.load(self.keys, c, mask=exists), self.row.load(self.sizes, c, mask=exists)
