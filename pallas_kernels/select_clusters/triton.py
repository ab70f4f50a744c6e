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
from pallas_kernels.select_clusters.reference import Candidates


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: clusters looked at at once.
        num_warps: see Triton.
    """

    block: int = 2048
    num_warps: int = 16


def heuristic(clusters: int) -> Config:
    """A config for shapes that were not tuned."""
    block = min(_pallas.tile(clusters, 32), 2048 if clusters <= 8192 else 4096)
    return Config(block, num_warps=max(1, min(block // 128, 32)))


def _kernel(
    logits_ref: Any,
    logsumexp_ref: Any,
    offsets_ref: Any,
    budget_ref: Any,
    layer_ref: Any,
    selected_ref: Any,
    clusters_ref: Any,
    starts_ref: Any,
    keys_ref: Any,
    *,
    config: Config,
    interpret: bool,
) -> None:
    _, kv_heads, group, clusters = logits_ref.shape
    row = pl.program_id(0)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    lane = jnp.arange(config.block)
    end = plt.load(offsets_ref.at[layer, b, h, jnp.int32(clusters)])
    blocks = pl.cdiv(clusters, config.block)

    def sizes_of(c: Any) -> Any:
        exists = c < clusters
        begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
        return plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins

    def score(i: Any, used: Any) -> Any:
        c = i * config.block + lane
        exists = c < clusters
        peak = jnp.full(config.block, -jnp.inf, jnp.float32)
        heads = []
        for g in range(group):
            g = jnp.int32(g)
            logits = plt.load(logits_ref.at[b, h, g, c], mask=exists, other=0)
            heads.append(logits - plt.load(logsumexp_ref.at[b, h, g]))
            peak = jnp.maximum(peak, heads[-1])
        total = sum(jnp.exp(x - peak) for x in heads)
        plt.store(keys_ref.at[b, h, c], ordered_bits(peak + jnp.log(total)), mask=exists)
        in_use = exists & (plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=end) < end)
        return jnp.maximum(used, jnp.max(jnp.where(in_use, i + 1, 0)))

    # Blocks past the last cluster in use are not looked at again.
    used = lax.fori_loop(0, blocks, score, jnp.int32(0))
    _pallas.barrier(interpret)

    def held(key: Any) -> Any:
        def add(i: Any, held: Any) -> Any:
            c = i * config.block + lane
            keys = plt.load(keys_ref.at[b, h, c], mask=c < clusters, other=0)
            return held + jnp.where(keys >= key, sizes_of(c), 0)

        return jnp.sum(lax.fori_loop(0, used, add, jnp.zeros(config.block, jnp.int32)))

    budget = plt.load(budget_ref.at[b])
    key, above = threshold(held, jnp.minimum(jnp.maximum(budget, 1), jnp.maximum(end, 1)))

    def mark(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        count, tokens, equal = state
        c = i * config.block + lane
        exists = c < clusters
        keys = plt.load(keys_ref.at[b, h, c], mask=exists, other=0)
        sizes = sizes_of(c)
        ties = jnp.where(keys == key, sizes, 0)
        before = above + equal + jnp.cumsum(ties) - ties
        marked = ((keys > key) & (sizes > 0)) | ((ties > 0) & (before < budget))
        marked = marked & (budget > 0)
        number = marked.astype(jnp.int32)
        kept = jnp.where(marked, sizes, 0)
        place = jnp.where(marked, count + jnp.cumsum(number) - 1, NO_ID)
        plt.store(selected_ref.at[b, h, c], marked, mask=exists)
        plt.store(clusters_ref.at[b, h, place], c, mask=marked)
        plt.store(starts_ref.at[b, h, place], tokens + jnp.cumsum(kept) - kept, mask=marked)
        return count + jnp.sum(number), tokens + jnp.sum(kept), equal + jnp.sum(ties)

    zero = jnp.int32(0)
    count, tokens, _ = lax.fori_loop(0, used, mark, (zero, zero, zero))

    def fill(i: Any, _: Any) -> None:
        c = i * config.block + lane
        rest = (c < clusters) & (c >= count)
        plt.store(
            clusters_ref.at[b, h, jnp.where(rest, c, NO_ID)], jnp.full_like(c, NO_ID), mask=rest
        )
        plt.store(
            starts_ref.at[b, h, jnp.where(rest, c, NO_ID)], jnp.full_like(c, tokens), mask=rest
        )
        unused = (c < clusters) & (c >= used * config.block)
        at = jnp.where(unused, c, NO_ID)
        plt.store(selected_ref.at[b, h, at], jnp.zeros(config.block, bool), mask=unused)

    lax.fori_loop(0, blocks, fill, None)
    plt.store(starts_ref.at[b, h, jnp.int32(clusters)], tokens)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
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
    row = (batch, kv_heads)
    selected, listed, starts, _ = _pallas.call(
        functools.partial(_kernel, config=config, interpret=interpret),
        (logits, logsumexp, offsets, budget.astype(jnp.int32), _pallas.scalar(layer)),
        (
            jax.ShapeDtypeStruct((*row, clusters), jnp.bool_),
            jax.ShapeDtypeStruct((*row, clusters), jnp.int32),
            jax.ShapeDtypeStruct((*row, clusters + 1), jnp.int32),
            jax.ShapeDtypeStruct((*row, clusters), jnp.uint32),
        ),
        (batch * kv_heads,),
        name="select_clusters",
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return Candidates(selected, listed, starts)
