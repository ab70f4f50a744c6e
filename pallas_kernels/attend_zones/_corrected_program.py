"""The kernel of the estimate by moments: what remains of each cluster, to second order.

`_rest.py` is its meaning. Of a cluster of n members, with logit l = q.c and mean value v, let r be
retrieved: n' = n - r remain, of which s are to be estimated. L is the sum of the retrieved's
logits, V that of their values. Then

    l' = l + (r l - L) / n'                   the logit of what remains
    v' = v + (r v - V) / n' = (n v - V) / n'  its mean value
    W = s e^{l'} (1 + m)                      its mass, to second order

and the output gets W v' + s e^{l'} C q. Where n' < n / 2, l' is at most l. With a = W n / n' that
is

    a v - sum over the retrieved of (a / n) value + sum over directions of (W h / (1 + m)) p w,

h being the share of its moments that the cluster keeps. So V is never made: a retrieved value
comes in with a weight of its own, as values do in attention. And W = a n' / n.

A program takes tiles of clusters. Retrieved rows are listed by rising clusters, so those of a tile
are one piece of the list, which the program reads twice: keys for r and L, then values. A matrix
of ones and zeros says which row is whose: products with it are sums by cluster, in a fixed order,
and give each row its cluster's weight. There are no atomics: two runs give the same bits.

Where n' is far less than n, what is left is a small difference of large terms. So weights of mean
values and of retrieved ones go into products as sums of two numbers each of the vectors' dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._config import RestConfig
from pallas_kernels.attend_zones._program import PartOfRow, State
from pallas_kernels.attend_zones._rest import MOST_MASS, share_of_moments
from pallas_kernels.attend_zones._weights import by_cluster, weigh
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, NO_ID

# Entries of the list of retrieved rows that one entry of `tops` stands for.
GRANULE = 64


class Tile(NamedTuple):
    """A tile of n clusters, and which retrieved rows are theirs.

    Attributes:
        at: `[n]` int32, the clusters.
        first, end: int32, the piece of the list that has their retrieved rows.
        sizes: `[n]` int32, members of each.
        most: `[n]` int32, members to be estimated, before the retrieved are taken out.
    """

    at: Array
    first: Array
    end: Array
    sizes: Array
    most: Array


class RestProgram(PartOfRow):
    """One program: its tiles of one row's clusters. `refs` are `RestOperands`."""

    def __init__(self, refs: Any, out: Any, config: RestConfig, scale: float) -> None:
        self.refs, self.out, self.config, self.scale = refs, out, config, scale
        # Float32's products are to be as exact, whatever they are with.
        exact = refs.query.dtype == jnp.float32
        self.value_parts, self.moment_parts = (3, 3) if exact else (2, 1)
        self.take(pl.program_id(0))
        self.split = self.part
        # Its parts are the last ones.
        self.part = self.split + (out.outputs.shape[0] - config.splits)

    def run(self) -> None:
        size = self.config.cluster_tile

        def step(carry: Any) -> Any:
            i, state = carry
            return i + 1, self.estimate((self.split + i * self.config.splits) * size, state)

        tiles = self.count_tiles()
        output, peak, _ = self.start(size)
        start = jnp.int32(0), (output, peak, jnp.zeros_like(peak))
        # Their number is known before: XLA's Triton broke down (jax 0.11.2) at a loop whose test
        # alone read a number that the loop carried.
        _, state = lax.while_loop(lambda carry: carry[0] < tiles, step, start)
        self.write(*state)

    def count_tiles(self) -> Array:
        """Count the program's tiles up to the last cluster in use."""
        size, splits = self.config.cluster_tile, self.config.splits
        room = self.refs.remaining.shape[2]
        most = pl.cdiv(pl.cdiv(room, size), splits)
        first = (self.split + jnp.arange(launch.tile(most)) * splits) * size
        last = plt.load(self.refs.offsets.at[*self.row, jnp.int32(room)])
        begins = plt.load(self.refs.offsets.at[*self.row, first], mask=first < room, other=0)
        # Past the last cluster in use no tile begins before the last member's end.
        return jnp.sum(jnp.where((first < room) & (begins < last), 1, 0))

    def estimate(self, first: Array, state: State) -> State:
        """Attend to what remains of a tile of clusters, from `first` on.

        The state is that of a running softmax, of which the masses are summed at once: `[g]`.
        """
        refs, (output, peak, total) = self.refs, state
        tile = self.load_tile(first)
        retrieved, logit_sums = self.retrieved(tile)
        left = tile.sizes - retrieved
        members = jnp.minimum(tile.most, left)
        keeps = members > 0
        of_heads = self.in_group[:, None] & keeps[None, :]
        heads, at = self.g[:, None], tile.at[None, :]
        logits = plt.load(refs.logits.at[self.b, self.h, heads, at], mask=of_heads, other=0)
        size, still, kept = (
            jnp.maximum(x, 1).astype(jnp.float32) for x in (tile.sizes, left, members)
        )
        gone = retrieved.astype(jnp.float32)[None, :] * logits - jnp.where(of_heads, logit_sums, 0)
        held = (gone > 0) & (2 * left < tile.sizes)[None, :]
        logits = logits + jnp.where(held, 0.0, gone / still[None, :])
        share = jnp.where(keeps, share_of_moments(tile.sizes, members), 0)

        def second_order(r: Array, more: Array) -> Array:
            held = plt.load(refs.lambdas.at[*self.row, tile.at, r], mask=keeps, other=0)
            return more + (0.5 * share * held)[None, :] * self.load_products(r, at, of_heads) ** 2

        more = lax.fori_loop(0, refs.lambdas.shape[4], second_order, jnp.zeros_like(logits))
        more = 1 + jnp.where(more > MOST_MASS, MOST_MASS, more)
        # Of a: with the peak of these all weights are at most 1, which every float holds.
        exponents = LOG2_E * logits + jnp.log2(more * (kept * size / still)[None, :])
        exponents = jnp.where(of_heads, exponents, MASKED)
        higher = jnp.maximum(peak, jnp.max(exponents, axis=1))
        weights = jnp.where(of_heads, jnp.exp2(exponents - higher[:, None]), 0.0)
        shrink = jnp.exp2(peak - higher)
        mass = weights * (still / size)[None, :]

        output = output * shrink[:, None]
        output = self.without_retrieved(output, tile, weights / size[None, :])
        means = self.load_vectors(refs.value_means, tile.at, keeps)
        output += weigh(weights, means, self.value_parts)
        share = mass / more * share[None, :]

        def along(r: Array, output: Array) -> Array:
            own = share * self.load_products(r, at, of_heads)
            if refs.weight_scales is not None:
                scales = refs.weight_scales.at[*self.row, tile.at, r]
                own *= plt.load(scales, mask=keeps, other=0)[None, :]
            vectors = self.load_vectors(refs.weights, tile.at, keeps, r)
            return output + weigh(own, vectors, self.moment_parts)

        output = lax.fori_loop(0, refs.lambdas.shape[4], along, output)
        return output, higher, total * shrink + jnp.sum(mass, axis=1)

    def load_tile(self, first: Array) -> Tile:
        refs, size, room = self.refs, self.config.cluster_tile, self.refs.remaining.shape[2]
        at = first + jnp.arange(size)
        low, high = (
            plt.load(refs.offsets.at[*self.row, at + i], mask=at < room, other=0) for i in (0, 1)
        )
        remaining = plt.load(refs.remaining.at[self.b, self.h, at], mask=at < room, other=0)
        sizes = high - low
        begin, end = self.place_of(first), self.place_of(first + size)
        return Tile(at, begin, end, sizes, jnp.minimum(remaining, sizes))

    def place_of(self, cluster: Array) -> Array:
        """Find the first place of the list with this cluster or a later one; else past its end."""
        granules = self.refs.tops.shape[2]
        granule = jnp.arange(launch.tile(granules))
        tops = self.refs.tops.at[self.b, self.h, granule]
        tops = plt.load(tops, mask=granule < granules, other=-1)
        first = jnp.min(jnp.where(tops >= cluster, granule, granules))
        at = first * GRANULE + jnp.arange(GRANULE)
        own = self.load_own(at, granules * GRANULE)
        return jnp.min(jnp.where(own >= cluster, at, granules * GRANULE))

    def load_own(self, at: Array, end: Array | int) -> Array:
        """Load the clusters of retrieved rows by their places in the list; -1 for none."""
        return plt.load(self.refs.own.at[self.b, self.h, at], mask=at < end, other=-1)

    def load_products(self, r: Array, clusters: Array, valid: Array) -> Array:
        """Load the query's products `[g, n]` with the r-th directions, zero where not valid."""
        at = (self.b, self.h, self.g[:, None], clusters, r)
        return plt.load(self.refs.products.at[*at], mask=valid, other=0)

    def load_vectors(self, vectors: Any, places: Array, valid: Array, *inner: Any) -> Array:
        """Load vectors `[n, d]` of the row's `[n]` places, zero where not valid."""
        at = vectors.at[*self.row, places[:, None], *inner, self.d]
        return plt.load(at, mask=self.of_rows(valid), other=0)

    def load_retrieved(self, at: Array, valid: Array, kv: int) -> tuple[Array, Array | None]:
        """Load keys or values `[n, d]` of places in the list, and their scales if they have any."""
        refs = self.refs
        token = plt.load(refs.tokens.at[self.b, self.h, at], mask=valid, other=NO_ID)
        if refs.cache is None:
            return self.load_rows_of(refs.store, refs.store_scales, token, valid, kv)
        slot = plt.load(refs.slots.at[self.b, self.h, at], mask=valid, other=NO_ID)
        # All but those that found no slot are there by now.
        held = valid & (slot >= 0) & (slot < refs.cache.shape[3])
        cached = self.load_rows_of(refs.cache, refs.cache_scales, slot, held, kv)
        others = valid & ~held

        def with_others() -> Any:
            found = self.load_rows_of(refs.store, refs.store_scales, token, others, kv)
            # What one of the two does not have is zero there.
            return jax.tree.map(jnp.add, cached, found)

        return lax.cond(jnp.sum(jnp.where(others, 1, 0)) > 0, with_others, lambda: cached)

    def load_rows_of(
        self, rows: Any, scales: Any, places: Array, valid: Array, kv: int
    ) -> tuple[Array, Array | None]:
        """Load keys or values of a store or a row cache, and their scales if they have any."""
        vectors = self.load_vectors(rows, places, valid, kv)
        if scales is None:
            return vectors, None
        return vectors, plt.load(scales.at[*self.row, places, kv], mask=valid, other=0)

    def each(self, tile: Tile, visit: Any, state: Any) -> Any:
        """Visit a tile's retrieved rows, `row_tile` at once.

        Args:
            tile: the clusters.
            visit: of places in the list, which of them are there, whose each is as bools
                `[rows, clusters]`, and the state; gives the next state.
            state: the first one.
        """
        size = self.config.row_tile

        def step(carry: Any) -> Any:
            first, state = carry
            at = first + jnp.arange(size)
            own = self.load_own(at, tile.end)
            whose = own[:, None] == tile.at[None, :]
            return first + size, visit(at, own >= 0, whose, state)

        # No `fori_loop`, which Triton would pipeline: mostly it goes round once, and some rows may
        # come from a host's memory, which asynchronous copies read at half of the speed.
        return lax.while_loop(lambda carry: carry[0] < tile.end, step, (tile.first, state))[1]

    def retrieved(self, tile: Tile) -> tuple[Array, Array]:
        """Count the retrieved rows of each cluster `[n]`, and sum their logits `[g, n]`."""
        query = self.load_query()

        def count(at: Array, valid: Array, whose: Array, state: Any) -> Any:
            number, sums = state
            keys, scales = self.load_retrieved(at, valid, 0)
            logits = self.scale * launch.dot(query, keys.astype(query.dtype), (1, 1))
            if scales is not None:
                logits = logits * scales[None, :]
            number = number + jnp.sum(jnp.where(whose, 1, 0), axis=0)
            return number, sums + by_cluster(logits, whose, (1, 0), 3)

        none = jnp.zeros(tile.at.shape, jnp.int32)
        sums = jnp.zeros((launch.MAX_GROUP, tile.at.shape[0]), jnp.float32)
        return self.each(tile, count, (none, sums))

    def without_retrieved(self, output: Array, tile: Tile, weights: Array) -> Array:
        """Take out the retrieved rows' values, with their clusters' weights `[g, n]`."""

        def take(at: Array, valid: Array, whose: Array, output: Array) -> Array:
            values, scales = self.load_retrieved(at, valid, 1)
            own = by_cluster(weights, whose, (1, 1), self.value_parts)
            if scales is not None:
                own = own * scales[None, :]
            return output - weigh(own, values, self.value_parts)

        return self.each(tile, take, output)
