"""`select_clusters` as two Triton kernels: one ranks clusters, the other selects a row's best."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas, _tuning
from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import NO_ID, ordered_bits
from pallas_kernels.select_clusters.reference import GRANULE, Candidates


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        share: clusters that a program of the first kernel ranks.
        block: clusters that the second one looks at at once. If that is all of them, they stay in
            registers; if not, each round of the bisection reads them again.
        share_warps, num_warps: the two kernels' warps, see Triton.
    """

    share: int = 512
    block: int = 8192
    share_warps: int = 4
    num_warps: int = 8


# The most clusters whose keys and sizes fit in the registers of 16 warps.
MOST_IN_REGISTERS = 16384


def heuristic(clusters: int) -> Config:
    """A config for shapes that were not tuned."""
    block = _pallas.tile(clusters, 32)
    if block > MOST_IN_REGISTERS:
        return Config(block=4096, num_warps=16)
    warps = max(1, min(block // 1024, 16))
    return Config(min(512, block), block, share_warps=max(1, min(4, block // 256)), num_warps=warps)


def _rank(*refs: Any, config: Config) -> None:
    """Keys in the order of group mass, and sizes; both zero for a cluster without members."""
    logits_ref, logsumexp_ref, offsets_ref, layer_ref, keys_ref, sizes_ref = refs
    _, kv_heads, group, clusters = logits_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    c = part * config.share + jnp.arange(config.share)
    exists = c < clusters
    begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
    sizes = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins
    peak = jnp.full(config.share, -jnp.inf, jnp.float32)
    heads = []
    for g in range(group):
        at = (b, h, jnp.int32(g))
        logits = plt.load(logits_ref.at[*at, c], mask=exists, other=0)
        heads.append(logits - plt.load(logsumexp_ref.at[at]))
        peak = jnp.maximum(peak, heads[-1])
    mass = sum(jnp.exp(x - peak) for x in heads)
    keys = ordered_bits(peak + jnp.log(mass))
    # The arrays are padded to whole blocks, so that no load of theirs needs a mask.
    plt.store(keys_ref.at[b, h, c], jnp.where(sizes > 0, keys, 0))
    plt.store(sizes_ref.at[b, h, c], sizes)


def _select(*refs: Any, clusters: int, config: Config) -> None:
    keys_ref, sizes_ref, budget_ref, selected_ref, clusters_ref, starts_ref, granules_ref = refs
    kv_heads = keys_ref.shape[1]
    row = pl.program_id(0)
    b, h = row // kv_heads, row % kv_heads
    lane = jnp.arange(config.block)
    blocks = keys_ref.shape[-1] // config.block
    in_registers = blocks == 1

    def load(i: Any) -> tuple[Any, Any, Any]:
        c = i * config.block + lane
        return c, plt.load(keys_ref.at[b, h, c]), plt.load(sizes_ref.at[b, h, c])

    def widen(i: Any, keys: Any, sizes: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        used, low, high = state
        lowest = jnp.min(jnp.where(sizes > 0, keys, jnp.uint32(2**32 - 1)))
        highest = jnp.max(keys)
        used = jnp.where(highest > 0, i + 1, used)
        return used, jnp.minimum(low, lowest), jnp.maximum(high, highest)

    nothing = jnp.int32(0), jnp.uint32(2**32 - 1), jnp.uint32(0)
    if in_registers:
        whole = load(jnp.int32(0))
        _, low, high = widen(jnp.int32(0), *whole[1:], nothing)
        used = jnp.int32(1)
    else:
        # Blocks past the last cluster in use are not looked at again.
        used, low, high = lax.fori_loop(0, blocks, lambda i, s: widen(i, *load(i)[1:], s), nothing)

    def each(visit: Any, state: Any) -> Any:
        """visit(clusters, keys, sizes, state) over all clusters in use, block by block."""
        if in_registers:
            return visit(*whole, state)
        return lax.fori_loop(0, used, lambda i, state: visit(*load(i), state), state)

    def held(key: Any) -> Any:
        def add(_: Any, keys: Any, sizes: Any, held: Any) -> Any:
            return held + jnp.where(keys >= key, sizes, 0)

        return jnp.sum(each(add, jnp.zeros(config.block, jnp.int32)))

    def largest_below(key: Any) -> Any:
        def widen(_: Any, keys: Any, __: Any, largest: Any) -> Any:
            return jnp.maximum(largest, jnp.where(keys < key, keys, 0))

        return jnp.max(each(widen, jnp.zeros(config.block, jnp.uint32)))

    budget = plt.load(budget_ref.at[b])
    key, above = threshold(
        held, jnp.maximum(budget, 1), low, high + jnp.uint32(1), largest_below=largest_below
    )

    def mark(c: Any, keys: Any, sizes: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        count, tokens, equal = state
        ties = jnp.where(keys == key, sizes, 0)
        before = above + equal + jnp.cumsum(ties) - ties
        marked = ((keys > key) & (sizes > 0)) | ((ties > 0) & (before < budget))
        marked = marked & (budget > 0)
        number = marked.astype(jnp.int32)
        kept = jnp.where(marked, sizes, 0)
        place = count + jnp.cumsum(number) - 1
        start = tokens + jnp.cumsum(kept) - kept
        at = jnp.where(marked, place, NO_ID)
        plt.store(selected_ref.at[b, h, c], marked, mask=c < clusters)
        plt.store(clusters_ref.at[b, h, at], c, mask=marked)
        plt.store(starts_ref.at[b, h, at], start, mask=marked)
        first = lax.div(start + (GRANULE - 1), jnp.int32(GRANULE))

        def write_granule(j: Any, _: Any) -> None:
            granule = first + j
            begins = (
                marked & (granule * GRANULE < start + kept) & (granule < granules_ref.shape[-1])
            )
            at = jnp.where(begins, granule, NO_ID)
            plt.store(granules_ref.at[b, h, at], place, mask=begins)

        lax.fori_loop(0, lax.div(jnp.max(kept), jnp.int32(GRANULE)) + 1, write_granule, None)
        return count + jnp.sum(number), tokens + jnp.sum(kept), equal + jnp.sum(ties)

    zero = jnp.int32(0)
    count, tokens, _ = each(mark, (zero, zero, zero))

    def fill(i: Any, _: Any) -> None:
        c = i * config.block + lane
        rest = (c < clusters) & (c >= count)
        at = jnp.where(rest, c, NO_ID)
        plt.store(clusters_ref.at[b, h, at], jnp.full_like(c, NO_ID), mask=rest)
        plt.store(starts_ref.at[b, h, at], jnp.full_like(c, tokens), mask=rest)
        unused = (c < clusters) & (c >= used * config.block)
        at = jnp.where(unused, c, NO_ID)
        plt.store(selected_ref.at[b, h, at], jnp.zeros(config.block, bool), mask=unused)

    def fill_granules(i: Any, _: Any) -> None:
        granule = i * config.block + lane
        rest = (granule < granules_ref.shape[-1]) & (granule * GRANULE >= tokens)
        at = jnp.where(rest, granule, NO_ID)
        last = jnp.full_like(granule, jnp.maximum(count - 1, 0))
        plt.store(granules_ref.at[b, h, at], last, mask=rest)

    lax.fori_loop(0, blocks, fill, None)
    lax.fori_loop(0, pl.cdiv(granules_ref.shape[-1], config.block), fill_granules, None)
    plt.store(starts_ref.at[b, h, jnp.int32(clusters)], tokens)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
    max_candidates: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Candidates:
    """See `pallas_kernels.select_clusters`.

    Raises:
        NotImplementedError: for groups that the kernel is not made for.
    """
    batch, kv_heads, group, clusters = logits.shape
    _pallas.check_heads("select_clusters", group, _pallas.HEAD_DIMS[0])
    config = config or _tuning.config("select_clusters", heuristic(clusters), clusters=clusters)

    def of_rows(size: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, kv_heads, size), dtype)

    padded = pl.cdiv(clusters, config.block) * config.block
    ranked = _pallas.call(
        functools.partial(_rank, config=config),
        (logits, logsumexp, offsets, _pallas.scalar(layer)),
        (of_rows(padded, jnp.uint32), of_rows(padded)),
        (padded // config.share, batch * kv_heads),
        name="rank_clusters",
        num_warps=config.share_warps,
        interpret=interpret,
    )
    results = _pallas.call(
        functools.partial(_select, clusters=clusters, config=config),
        (*ranked, budget.astype(jnp.int32)),
        (
            of_rows(clusters, jnp.bool_),
            of_rows(clusters),
            of_rows(clusters + 1),
            of_rows(pl.cdiv(max_candidates, GRANULE)),
        ),
        (batch * kv_heads,),
        name="select_clusters",
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return Candidates(*results)
