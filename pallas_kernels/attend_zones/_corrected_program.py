"""The last kernel of the estimate by moments: sums of values, of what remains of each cluster.

`_rest.py` is its meaning. Of a cluster of n members with mean value v, `_remains.py` has found the
weights: a of v, w of each direction's vector. With r members retrieved the output gets

    a v - sum over the retrieved of (a / n) value + sum over directions of w vector

So a retrieved value comes in with a weight of its own, as values do in attention.

A program takes tiles of clusters that follow on each other, and then the retrieved rows of these
clusters, which are one piece of the list. So what it takes out is of what it has put in.

There is no matrix product: a thread multiplies what it reads, for each head, and its sums wait for
no other thread until the end. With few heads that is faster than to hand vectors on to the matrix
units, and all of it is float32.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._config import RestConfig
from pallas_kernels.attend_zones._list_reader import ListReader
from pallas_kernels.attend_zones._program import PartOfRow
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, NO_ID

# Up to so many directions are written out, so that their vectors are asked for at once.
MOST_UNROLLED = 4

# For each head the sums `[n, d]` of vectors at the n places of a tile, float32.
Sums = list[Array]


class RestProgram(PartOfRow, ListReader):
    """One program: its part of one row's clusters, for some of its heads. See `RestOperands`."""

    def __init__(self, refs: Any, out: Any, config: RestConfig) -> None:
        self.refs, self.out, self.config = refs, out, config
        group = refs.query.shape[2]
        # Programs that read the same vectors for other heads come one after another.
        shares = pl.cdiv(group, config.heads)
        self.take(pl.program_id(0) // shares)
        self.first_head = pl.program_id(0) % shares * config.heads
        # Whether there are so many in the last share is asked for each.
        self.heads, self.all_heads = min(config.heads, group), group % config.heads == 0
        self.split = self.part
        # Its parts are the last ones.
        self.part = self.split + (out.outputs.shape[0] - config.splits)

    def run(self) -> None:
        size, of_tile = self.config.cluster_tile, self.config.remains_tile
        first, end, last = self.find_tiles()
        peaks = [self.find_peak(j, first, end) for j in range(self.heads)]
        sums = [jnp.zeros((size, self.d.size), jnp.float32) for _ in peaks]
        of_step = size * self.config.ahead
        steps = of_tile // of_step

        def step(i: Array, sums: Sums) -> Sums:
            tile = lax.div(i, jnp.int32(steps))
            shares = [jnp.exp2(self.peak(j, tile) - peak) for j, (peak, _) in enumerate(peaks)]
            return self.add_clusters(i * of_step, last, shares, sums)

        sums = lax.fori_loop(first * steps, end * steps, step, sums)
        piece = self.find_piece(first * of_tile, end * of_tile)
        sums = self.without_retrieved(sums, *piece, [peak for peak, _ in peaks])
        for j, (peak, total) in enumerate(peaks):
            self.write_head(j, jnp.sum(sums[j], axis=0), peak, total)

    def head(self, j: int) -> tuple[Array, Array]:
        """Give the j-th head's number, and whether there is one."""
        number = self.first_head + j
        return number, jnp.bool_(True) if self.all_heads else number < self.refs.query.shape[2]

    def find_tiles(self) -> tuple[Array, Array, Array]:
        """Find the first and the end of the program's tiles, of `remains_tile` clusters.

        Returns:
            These, and the end of all clusters of which something is to be estimated.
        """
        size, splits = self.config.remains_tile, self.config.splits
        number = self.refs.ends.shape[2]
        tile = jnp.arange(launch.tile(number))
        ends = plt.load(self.refs.ends.at[self.b, self.h, tile], mask=tile < number, other=0)
        last = jnp.max(ends)
        used = pl.cdiv(last, size)
        share = lax.div(used + splits - 1, jnp.int32(splits))
        begin = jnp.minimum(self.split * share, used)
        return begin, jnp.minimum(begin + share, used), last

    def find_peak(self, j: int, first: Array, end: Array) -> tuple[Array, Array]:
        """Find the greatest peak of the program's tiles, and the sum of their masses."""
        refs, (head, exists) = self.refs, self.head(j)
        most = pl.cdiv(refs.peaks.shape[3], self.config.splits)
        tile = first + jnp.arange(launch.tile(most))
        mask = (tile < end) & exists
        at = (self.b, self.h, head, tile)
        peaks = plt.load(refs.peaks.at[*at], mask=mask, other=MASKED)
        masses = plt.load(refs.masses.at[*at], mask=mask, other=0)
        peak = jnp.max(peaks)
        return peak, jnp.sum(masses * jnp.exp2(peaks - peak))

    def peak(self, j: int, tile: Array, valid: Array | bool = True) -> Array:
        """Load the peaks of tiles, of any shape; MASKED where not valid or without such a head."""
        head, exists = self.head(j)
        peaks = self.refs.peaks.at[self.b, self.h, head, tile]
        return plt.load(peaks, mask=jnp.broadcast_to(exists & valid, tile.shape), other=MASKED)

    def add_clusters(self, first: Array, end: Array, shares: list[Array], sums: Sums) -> Sums:
        """Add the vectors of `ahead` times `cluster_tile` clusters.

        Args:
            first: of them.
            end: of all that are to be read.
            shares: for each head what weights are multiplied by.
            sums: so far.
        """
        refs, size, rank = self.refs, self.config.cluster_tile, self.refs.weights.shape[4]
        ats = [first + k * size + jnp.arange(size) for k in range(self.config.ahead)]
        keeps = [
            plt.load(refs.each.at[self.b, self.h, at], mask=at < end, other=0) > 0 for at in ats
        ]

        def load(vectors: Any, weights: Any, *inner: Any) -> list[tuple[Array, list[Array]]]:
            return [
                (
                    self.load_vectors(vectors, at, at < end, *inner),
                    [
                        self.load_weights(j, weights, at, at < end, *inner)
                        for j in range(self.heads)
                    ],
                )
                for at in ats
            ]

        def add(loaded: list[tuple[Array, list[Array]]], sums: Sums) -> Sums:
            for (vectors, weights), keep in zip(loaded, itertools.cycle(keeps)):
                if vectors.dtype != jnp.int8:
                    # What nothing is kept of may hold anything, NaN included.
                    vectors = jnp.where(keep[:, None], vectors, 0)
                vectors = vectors.astype(jnp.float32)
                sums = [
                    x + (own * share)[:, None] * vectors
                    for x, own, share in zip(sums, weights, shares, strict=True)
                ]
            return sums

        loaded = load(refs.value_means, refs.means)
        if rank <= MOST_UNROLLED:
            # All is asked for before any of it is waited for.
            loaded += [x for r in range(rank) for x in load(refs.weights, refs.vectors, r)]
        sums = add(loaded, sums)
        if rank <= MOST_UNROLLED:
            return sums

        def along(r: Array, sums: Sums) -> Sums:
            return add(load(refs.weights, refs.vectors, r), sums)

        return lax.fori_loop(0, rank, along, sums)

    def load_weights(self, j: int, weights: Any, at: Array, valid: Array, *inner: Any) -> Array:
        """Load the weights `[n]` of clusters, for the j-th head."""
        head, exists = self.head(j)
        weights = weights.at[*inner, self.b, self.h, head, at]
        return plt.load(weights, mask=valid & exists, other=0)

    def without_retrieved(self, sums: Sums, begin: Array, end: Array, peaks: list[Array]) -> Sums:
        """Take out the retrieved rows' values, of a piece of the list."""
        size, ahead = self.config.cluster_tile, self.config.ahead

        def listed(first: Array) -> list[tuple[Array, Array, Array]]:
            ats = (first + k * size + jnp.arange(size) for k in range(ahead))
            return [self.load_listed(at, end) for at in ats]

        def step(carry: Any) -> Any:
            first, rows, sums = carry
            # The next ones' places are on their way while these ones' values are.
            following = listed(first + ahead * size)
            values = self.load_values(rows)
            weights = [self.row_weights(own, token != NO_ID, peaks) for own, token, _ in rows]
            for (vectors, scales), of_heads in zip(values, weights, strict=True):
                vectors = vectors.astype(jnp.float32)
                if scales is not None:
                    vectors = vectors * scales[:, None]
                sums = [x - own[:, None] * vectors for x, own in zip(sums, of_heads, strict=True)]
            return first + ahead * size, following, sums

        # No `fori_loop`, which Triton would pipeline: some rows may come from a host's memory,
        # which asynchronous copies read at half of the speed.
        start = begin, listed(begin), sums
        found: Sums = lax.while_loop(lambda carry: carry[0] < end, step, start)[2]
        return found

    def row_weights(self, own: Array, valid: Array, peaks: list[Array]) -> list[Array]:
        """Load what values of retrieved rows `[n]` come in with, for each head.

        Args:
            own: their clusters.
            valid: which there are.
            peaks: of the program.
        """
        refs = self.refs
        own = jnp.where(valid, own, 0)
        tile = lax.div(own, jnp.int32(self.config.remains_tile))
        each = plt.load(refs.each.at[self.b, self.h, own], mask=valid, other=0)
        loaded = [
            # Of no other tile: its peak may be so much higher that 2 to its power is infinite.
            (self.load_weights(j, refs.means, own, valid), self.peak(j, tile, valid))
            for j in range(self.heads)
        ]
        return [
            weights * each * jnp.exp2(of_tile - peak)
            for (weights, of_tile), peak in zip(loaded, peaks, strict=True)
        ]

    def load_listed(self, at: Array, end: Array) -> tuple[Array, Array, Array]:
        """Load clusters, tokens and slots of places `[n]` of the list."""
        refs, inside = self.refs, at < end
        where = self.b, self.h, at
        token = plt.load(refs.tokens.at[*where], mask=inside, other=NO_ID)
        own = plt.load(refs.own.at[*where], mask=inside, other=NO_ID)
        if refs.cache is None:
            return own, token, token
        return own, token, plt.load(refs.slots.at[*where], mask=inside, other=NO_ID)

    def load_values(
        self, rows: list[tuple[Array, Array, Array]]
    ) -> list[tuple[Array, Array | None]]:
        """Load values `[n, d]` of each tile of retrieved rows, and their scales if they have any.

        Args:
            rows: tiles, as `load_listed` gives them.
        """
        refs = self.refs
        if refs.cache is None:
            store = refs.store, refs.store_scales
            return [self.load_rows_of(*store, token, token != NO_ID) for _, token, _ in rows]
        # All but those that found no slot are there by now.
        held = [(slot >= 0) & (slot < refs.cache.shape[3]) for _, _, slot in rows]
        others = [(token != NO_ID) & ~own for (_, token, _), own in zip(rows, held, strict=True)]
        cached = [
            self.load_rows_of(refs.cache, refs.cache_scales, slot, (token != NO_ID) & own)
            for (_, token, slot), own in zip(rows, held, strict=True)
        ]

        def with_others() -> Any:
            found = [
                self.load_rows_of(refs.store, refs.store_scales, token, own)
                for (_, token, _), own in zip(rows, others, strict=True)
            ]
            # What one of the two does not have is zero there.
            return jax.tree.map(jnp.add, cached, found)

        number = sum(jnp.sum(jnp.where(x, 1, 0)) for x in others)
        found: list[tuple[Array, Array | None]] = lax.cond(
            jnp.asarray(number) > 0, with_others, lambda: cached
        )
        return found

    def load_rows_of(
        self, rows: Any, scales: Any, places: Array, valid: Array
    ) -> tuple[Array, Array | None]:
        """Load values of a store or a row cache, and their scales if they have any."""
        vectors = self.load_vectors(rows, places, valid, 1)
        if scales is None:
            return vectors, None
        return vectors, plt.load(scales.at[*self.row, places, 1], mask=valid, other=0)

    def load_vectors(self, vectors: Any, places: Array, valid: Array, *inner: Any) -> Array:
        """Load vectors `[n, d]` of the row's `[n]` places, zero where not valid."""
        at = vectors.at[*self.row, places[:, None], *inner, self.d]
        return plt.load(at, mask=self.of_rows(valid), other=0)

    def write_head(self, j: int, output: Array, peak: Array, total: Array) -> None:
        """Write the part's output `[d]` and logsumexp of the j-th head."""
        head, exists = self.head(j)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        logsumexp = jnp.where(empty, MASKED, (peak + jnp.log2(total)) / LOG2_E)
        at, d = (self.part, self.b, self.h, head), self.d[0]
        mask = (d < self.head_dim) & exists
        plt.store(self.out.outputs.at[*at, d], output / total, mask=mask)
        plt.store(self.out.logsumexps.at[*at], logsumexp, mask=exists)
