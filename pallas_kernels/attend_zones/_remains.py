"""The kernel of what remains of each cluster: the second of three of the estimate by moments.

`_rest.py` is its meaning. Of a cluster of n members with logit l, let r be retrieved: n' = n - r
remain, of which s are to be estimated. L is the sum of the retrieved's logits. Then

    l' = l + (r l - L) / n'                 the logit of what remains
    a = s e^{l'} (1 + m) n / n'             what its mean value is multiplied by, to second order
    w = s e^{l'} h p                        what multiplies a direction's weight vector

h being the share of its moments that the cluster keeps, and l' at most l where n' < n / 2. The mass
is a n' / n. The launch of the zones has written the retrieved rows' logits, so no row is read.

Retrieved rows are listed by rising clusters, so a cluster's are a run of the list. The launch
before (`_runs.py`) has written where each begins; a thread goes through its cluster's. So there
are no atomics, and two runs give the same bits.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._config import RestConfig
from pallas_kernels.attend_zones._program import PartOfRow
from pallas_kernels.attend_zones._rest import MOST_MASS, share_of_moments
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.types import MASKED, NO_ID

# Rows of a cluster that are asked for before it is known whether they are its.
UNROLLED = 4


class RemainsOperands(NamedTuple):
    """The kernel's operands, in order; None for what is not there.

    Attributes:
        query: `[batch, kv_heads, group, head_dim]`; its shape alone is used.
        exponents: `[batch, kv_heads, group, retrieved]` float32: binary logarithms of the retrieved
            rows' masses.
        tokens: as in `Picks`.
        own: `clusters` of `Correction`.
        begins, end: from `_runs.py`.
        logits, offsets, remaining: as in `Estimate`.
        products: as in `Correction`.
        lambdas, weight_scales: of its moments.
        layer: int32 scalar.
    """

    query: Any
    exponents: Any
    tokens: Any
    own: Any
    begins: Any
    end: Any
    logits: Any
    offsets: Any
    remaining: Any
    products: Any
    lambdas: Any
    weight_scales: Any
    layer: Any


class Remains(NamedTuple):
    """The kernel's results, in order; float32. Weights of a tile are over 2^peak.

    Attributes:
        means: `[batch, kv_heads, group, clusters]`, a; zero where nothing is to be estimated.
        vectors: `[rank, batch, kv_heads, group, clusters]`, w; with the scale of a vector in int8.
        each: `[batch, kv_heads, clusters]`, 1 / n; zero where nothing is to be estimated.
        peaks: `[batch, kv_heads, group, tiles]`, a binary logarithm.
        masses: the same, the sum of a tile's masses.
        ends: `[batch, kv_heads, tiles]` int32, the end of the clusters of which something is to be
            estimated; zero where there are none.
    """

    means: Any
    vectors: Any
    each: Any
    peaks: Any
    masses: Any
    ends: Any


class RemainsProgram(PartOfRow):
    """One program: a tile of one row's clusters. Its vectors are of clusters, `[n]`, head by head.

    So each thread has clusters of its own, and hands nothing on but for the greatest and the sums.
    """

    def __init__(self, refs: RemainsOperands, out: Remains, config: RestConfig) -> None:
        self.refs, self.out, self.config = refs, out, config
        self.take(pl.program_id(0))
        self.heads = [jnp.int32(j) for j in range(refs.query.shape[2])]

    def run(self) -> None:
        refs, out, size = self.refs, self.out, self.config.remains_tile
        at = self.part * size + jnp.arange(size)
        inside = at < refs.remaining.shape[2]
        low, high = (
            plt.load(refs.offsets.at[*self.row, at + i], mask=inside, other=0) for i in (0, 1)
        )
        remaining = plt.load(refs.remaining.at[self.b, self.h, at], mask=inside, other=0)
        places = [(self.b, self.h, j, at) for j in self.heads]
        wholes = [plt.load(refs.logits.at[*place], mask=inside, other=0) for place in places]
        retrieved, sums = self.retrieved(at)

        sizes = high - low
        left = sizes - retrieved
        members = jnp.minimum(jnp.minimum(remaining, sizes), left)
        keeps = members > 0
        all_of, still, kept = (
            jnp.maximum(x, 1).astype(jnp.float32) for x in (sizes, left, members)
        )
        each, few = 1 / all_of, 2 * left < sizes
        share = jnp.where(keeps, share_of_moments(sizes, members), 0)
        more = self.second_order(places, keeps, share)
        count, kept_part = jnp.log2(kept * all_of / still), still * each
        of_vectors = kept_part * share
        firsts = []
        for j, place in enumerate(places):
            whole = LOG2_E * wholes[j]
            gone = (retrieved.astype(jnp.float32) * whole - sums[j]) / still
            exponents = whole + jnp.where((gone > 0) & few, 0.0, gone) + count
            exponents = jnp.where(keeps, exponents, MASKED)
            # Two more: the second order makes it at most thrice as much.
            peak = jnp.max(exponents) + 2
            first = jnp.where(keeps, jnp.exp2(exponents - peak), 0.0)
            weights = first * (1 + jnp.where(more[j] > MOST_MASS, MOST_MASS, more[j]))
            plt.store(out.means.at[*place], weights, mask=inside)
            firsts.append(first * of_vectors)
            tile = (*place[:3], self.part)
            plt.store(out.peaks.at[*tile], peak)
            plt.store(out.masses.at[*tile], jnp.sum(weights * kept_part))

        def along(r: Array, _: None) -> None:
            scales: Any = 1.0
            if refs.weight_scales is not None:
                scales = plt.load(refs.weight_scales.at[*self.row, at, r], mask=keeps, other=0)
            for first, place in zip(firsts, places, strict=True):
                products = plt.load(refs.products.at[*place, r], mask=keeps, other=0)
                plt.store(out.vectors.at[r, *place], first * products * scales, mask=inside)

        lax.fori_loop(0, refs.lambdas.shape[4], along, None)
        plt.store(out.each.at[self.b, self.h, at], jnp.where(keeps, each, 0), mask=inside)
        plt.store(out.ends.at[self.b, self.h, self.part], jnp.max(jnp.where(keeps, at + 1, 0)))

    def second_order(self, places: list[Any], keeps: Array, share: Array) -> list[Array]:
        """Find m, before it is capped, of each head's clusters."""

        def step(r: Array, more: list[Array]) -> list[Array]:
            at = places[0][-1]
            held = plt.load(self.refs.lambdas.at[*self.row, at, r], mask=keeps, other=0)
            products = [
                plt.load(self.refs.products.at[*place, r], mask=keeps, other=0) for place in places
            ]
            held = 0.5 * share * held
            return [x + held * product**2 for x, product in zip(more, products, strict=True)]

        none = [jnp.zeros(share.shape, jnp.float32) for _ in places]
        found: list[Array] = lax.fori_loop(0, self.refs.lambdas.shape[4], step, none)
        return found

    def retrieved(self, clusters: Array) -> tuple[Array, list[Array]]:
        """Count the retrieved rows of the tile's clusters, and sum each head's exponents of them.

        Args:
            clusters: `[n]` int32.
        """
        refs, row = self.refs, self.row[1:]
        inside = clusters < refs.remaining.shape[2]
        begins = plt.load(refs.begins.at[*row, clusters], mask=inside, other=-1)
        end = plt.load(refs.end.at[*row])
        # What was not written may be anything: no row of the cluster is there.
        there = inside & (begins >= 0) & (begins < end)
        own = plt.load(refs.own.at[*row, begins], mask=there, other=NO_ID)
        there &= own == clusters

        def load(at: Array, goes_on: Array) -> tuple[Array, Array, list[Array]]:
            mask = goes_on & (at < end)
            token = plt.load(refs.tokens.at[*row, at], mask=mask, other=NO_ID)
            own = plt.load(refs.own.at[*row, at], mask=mask, other=-1)
            exponents = [
                plt.load(refs.exponents.at[*row, j, at], mask=mask, other=0) for j in self.heads
            ]
            # A place without a row belongs to all.
            return token != NO_ID, (token == NO_ID) & mask | (own == clusters), exponents

        def step(carry: Any) -> Any:
            place, goes_on, (number, sums) = carry
            for is_row, theirs, exponents in [load(place + i, goes_on) for i in range(UNROLLED)]:
                goes_on &= theirs
                counts = goes_on & is_row
                number = number + counts.astype(jnp.int32)
                sums = [x + jnp.where(counts, y, 0) for x, y in zip(sums, exponents, strict=True)]
            return place + UNROLLED, goes_on, (number, sums)

        none = jnp.zeros(clusters.shape, jnp.int32)
        start = none, [jnp.zeros(clusters.shape, jnp.float32) for _ in self.heads]
        found: tuple[Array, list[Array]] = lax.while_loop(
            lambda carry: jnp.max(carry[1].astype(jnp.int32)) > 0, step, (begins, there, start)
        )[2]
        return found
