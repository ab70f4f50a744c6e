"""`select_clusters` as a Triton kernel: one program a row, by bisection on the masses' bits."""

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
        block: clusters looked at at once. If that is all of them, their keys stay in registers;
            if not, each round of the bisection reads them again.
        num_warps: see Triton.
    """

    block: int = 8192
    num_warps: int = 16


# The most clusters whose keys and sizes fit in the registers of 16 warps.
MOST_IN_REGISTERS = 16384


def heuristic(clusters: int) -> Config:
    """A config for shapes that were not tuned."""
    block = _pallas.tile(clusters, 32)
    if block > MOST_IN_REGISTERS:
        return Config(block=8192, num_warps=32)
    return Config(block, num_warps=max(1, min(block // 256, 16)))


def _kernel(*refs: Any, config: Config, interpret: bool) -> None:
    logits_ref, logsumexp_ref, offsets_ref, budget_ref, layer_ref, *results = refs
    selected_ref, clusters_ref, starts_ref, granules_ref, *scratch = results
    _, kv_heads, group, clusters = logits_ref.shape
    row = pl.program_id(0)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    lane = jnp.arange(config.block)
    blocks = pl.cdiv(clusters, config.block)
    in_registers = blocks == 1

    def load(c: Any) -> tuple[Any, Any]:
        """Keys and sizes of clusters; zero where there is none."""
        exists = c < clusters
        begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
        sizes = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins
        peak = jnp.full(config.block, -jnp.inf, jnp.float32)
        heads = []
        for g in range(group):
            at = (b, h, jnp.int32(g))
            logits = plt.load(logits_ref.at[*at, c], mask=exists, other=0)
            heads.append(logits - plt.load(logsumexp_ref.at[at]))
            peak = jnp.maximum(peak, heads[-1])
        mass = sum(jnp.exp(x - peak) for x in heads)
        keys = ordered_bits(peak + jnp.log(mass))
        return jnp.where(sizes > 0, keys, 0), sizes

    if in_registers:
        keys, sizes = load(lane)
        used = 1
        low, high = _range(keys, sizes)
    else:
        keys_ref, sizes_ref = scratch

        def write(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            used, low, high = state
            c = i * config.block + lane
            keys, sizes = load(c)
            plt.store(keys_ref.at[b, h, c], keys)
            plt.store(sizes_ref.at[b, h, c], sizes)
            lowest, highest = _range(keys, sizes)
            used = jnp.where(highest > 0, i + 1, used)
            return used, jnp.minimum(low, lowest), jnp.maximum(high, highest)

        empty = jnp.int32(0), jnp.uint32(2**32 - 1), jnp.uint32(0)
        # Blocks past the last cluster in use are not looked at again.
        used, low, high = lax.fori_loop(0, blocks, write, empty)
        _pallas.barrier(interpret)

    def each(visit: Any, state: Any) -> Any:
        """visit(clusters, keys, sizes, state) over all clusters in use, block by block."""
        if in_registers:
            return visit(lane, keys, sizes, state)

        def of_block(i: Any, state: Any) -> Any:
            c = i * config.block + lane
            at = (b, h, c)
            return visit(c, plt.load(keys_ref.at[at]), plt.load(sizes_ref.at[at]), state)

        return lax.fori_loop(0, used, of_block, state)

    def held(key: Any) -> Any:
        def add(_: Any, keys: Any, sizes: Any, held: Any) -> Any:
            return held + jnp.where(keys >= key, sizes, 0)

        return jnp.sum(each(add, jnp.zeros(config.block, jnp.int32)))

    budget = plt.load(budget_ref.at[b])
    key, above = threshold(held, jnp.maximum(budget, 1), low, high + jnp.uint32(1))

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
        plt.store(
            granules_ref.at[b, h, at], jnp.full_like(granule, jnp.maximum(count - 1, 0)), mask=rest
        )

    lax.fori_loop(0, blocks, fill, None)
    lax.fori_loop(0, pl.cdiv(granules_ref.shape[-1], config.block), fill_granules, None)
    plt.store(starts_ref.at[b, h, jnp.int32(clusters)], tokens)


def _range(keys: Any, sizes: Any) -> tuple[Any, Any]:
    """The least and the largest key of clusters with members."""
    return jnp.min(jnp.where(sizes > 0, keys, jnp.uint32(2**32 - 1))), jnp.max(keys)


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

    # Whole blocks, whose loads need no mask.
    padded = pl.cdiv(clusters, config.block) * config.block
    scratch = (of_rows(padded, jnp.uint32), of_rows(padded)) if padded > config.block else ()
    results = _pallas.call(
        functools.partial(_kernel, config=config, interpret=interpret),
        (logits, logsumexp, offsets, budget.astype(jnp.int32), _pallas.scalar(layer)),
        (
            of_rows(clusters, jnp.bool_),
            of_rows(clusters),
            of_rows(clusters + 1),
            of_rows(pl.cdiv(max_candidates, GRANULE)),
            *scratch,
        ),
        (batch * kv_heads,),
        name="select_clusters",
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return Candidates(*results[:4])
