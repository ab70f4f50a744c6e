"""`select_clusters` as Triton kernels: rank the clusters, split off most of them, list the best."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.numerics import ordered_bits
from pallas_kernels.select_clusters._config import Config, heuristic
from pallas_kernels.select_clusters._list import list_chunk
from pallas_kernels.select_clusters._ranked import Drawn, Ranked, RankedRefs
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.head_calls import HeadCalls
from pallas_kernels.toolbox.sampled_split import (
    Lists,
    find_bracket,
    list_shapes,
    places_of_threads,
    sample_stride,
    split,
)
from pallas_kernels.toolbox.selection_end import end_of_all, find_end, read_end
from pallas_kernels.types import GRANULE, NO_ID, Candidates, Reach

__all__ = ["Config", "heuristic", "select_clusters"]


def _rank(
    logits_ref: Any,
    logsumexp_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    reach: Any,
    keys_ref: Any,
    sizes_ref: Any,
    drawn_refs: Drawn | None,
    *,
    config: Config,
) -> None:
    """Keys in the order of group mass, and sizes; both zero for a cluster without members.

    `reach` is a `Reach` of refs, or None.
    """
    _, kv_heads, group, clusters = logits_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    c = part * config.share + jnp.arange(config.share)
    exists = c < clusters
    begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
    sizes = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins
    peak = jnp.full(config.share, -jnp.inf, jnp.float32)
    if reach is not None:
        deviations = plt.load(reach.deviations.at[layer, b, h, c], mask=exists, other=0)
        deviations = deviations.astype(jnp.float32)
    heads = []
    for g in range(group):
        at = (b, h, jnp.int32(g))
        logits = plt.load(logits_ref.at[*at, c], mask=exists, other=0)
        if reach is not None:
            logits = logits + plt.load(reach.lengths.at[at]) * deviations
        heads.append(logits - plt.load(logsumexp_ref.at[at]))
        peak = jnp.maximum(peak, heads[-1])
    mass = sum(jnp.exp(x - peak) for x in heads)
    keys = ordered_bits(peak + jnp.log(mass))
    keys = jnp.where(sizes > 0, keys, 0)
    # The arrays are padded to whole programs, so that no store of theirs needs a mask.
    plt.store(keys_ref.at[b, h, c], keys)
    plt.store(sizes_ref.at[b, h, c], sizes)
    if drawn_refs is not None:
        # Here they are at hand; one program alone waits long for so many scattered reads.
        stride = sample_stride(clusters, config.sample)
        drawn = exists & (c % stride == stride // 2)
        at = (b, h, jnp.where(drawn, c // stride, NO_ID))
        for ref, x in zip(drawn_refs, (keys, sizes), strict=True):
            plt.store(ref.at[at], x, mask=drawn)


def _bracket(
    refs: RankedRefs,
    drawn_refs: Drawn,
    bracket_ref: Any,
    number_ref: Any,
    *,
    config: Config,
    interpret: bool,
) -> None:
    """Find two keys between which the selection ends: see `find_bracket`."""
    ranked = Ranked(refs, interpret)
    row, clusters = ranked.row, ranked.offsets.shape[-1] - 1
    stride = sample_stride(clusters, config.sample)

    def load(i: Any) -> tuple[Any, Any]:
        exists = stride * i + stride // 2 < clusters
        return row.load(drawn_refs.keys, i, mask=exists), row.load(drawn_refs.sizes, i, mask=exists)

    sizes = config.sample, 32 * config.num_warps
    find_bracket(row, bracket_ref, number_ref, load, clusters, ranked.budget, *sizes)


def _split(
    refs: RankedRefs,
    bracket_ref: Any,
    number_ref: Any,
    written: Lists,
    *,
    config: Config,
    interpret: bool,
) -> None:
    """List what lies in the bracket: see `split`. The number of it is written in place."""
    del number_ref
    ranked = Ranked(refs, interpret)
    at = pl.program_id(0), written, bracket_ref
    split(ranked.row, *at, ranked.load, ranked.clusters, config.chunk)


def _end(refs: RankedRefs, lists: Lists, end_ref: Any, *, config: Config, interpret: bool) -> None:
    """Find the end of the selection: see `find_end`."""
    ranked = Ranked(refs, interpret)
    budget = jnp.maximum(ranked.budget, 1)
    lists, sizes = lists._replace(end=end_ref), (config.tile, 32 * config.end_warps)
    find_end(ranked.row, lists, ranked.load, ranked.clusters, budget, *sizes)


def _list(
    refs: RankedRefs,
    found: Lists | None,
    selected_ref: Any,
    clusters_ref: Any,
    starts_ref: Any,
    granules_ref: Any,
    *,
    config: Config,
    interpret: bool,
) -> None:
    """List a chunk's selected clusters, from where those of the chunks before it end."""
    ranked = Ranked(refs, interpret)
    row = ranked.row
    part, budget = pl.program_id(0), ranked.budget
    threads = 32 * config.num_warps
    if found is None:
        places = places_of_threads(config.tile, threads)
        half = max(len(places) // 2, 1)
        # There is room for more clusters than are in use: half of the tile may hold them.
        lower, upper = places[:half], places[half:]
        near = [ranked.element(place) for place in lower]

        def find(rest: list[Any]) -> Any:
            elements = [*near, *map(ranked.element, rest)]
            return end_of_all(row, part, elements, jnp.maximum(budget, 1), config.chunk)

        in_lower = ranked.none_from(half * threads)
        end = lax.cond(in_lower, lambda: find([]), lambda: find(upper))
    else:
        sizes = config.chunk, threads
        end = read_end(row, part, found, ranked.load, ranked.clusters, *sizes)
    listed = selected_ref, clusters_ref, starts_ref, granules_ref
    list_chunk(row, ranked.load, end, budget > 0, listed, chunk=config.chunk, threads=threads)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
    max_candidates: int,
    reach: Reach | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Candidates:
    """See `pallas_kernels.select_clusters`.

    Raises:
        NotImplementedError: for groups that the kernel is not made for.
        ValueError: the config's tile does not hold the clusters that it is to hold.
    """
    batch, kv_heads, group, clusters = logits.shape
    launch.check_heads("select_clusters", group, launch.HEAD_DIMS[0])
    config = config or tuning.config(
        "select_clusters",
        heuristic(batch * kv_heads, clusters),
        rows=batch * kv_heads,
        clusters=clusters,
    )

    if config.in_registers and config.tile < clusters:
        raise ValueError(
            f"select_clusters: a tile of {config.tile} does not hold {clusters} clusters; give a "
            "larger one, or in_registers=False"
        )

    rows = HeadCalls((batch, kv_heads), interpret)
    call = functools.partial(rows.call, num_warps=config.num_warps)
    padded = pl.cdiv(clusters, config.share) * config.share
    drawn = None
    if not config.in_registers:
        drawn = Drawn(rows.of(config.sample, dtype=jnp.uint32), rows.of(config.sample))
    keys, sizes, drawn = call(
        functools.partial(_rank, config=config),
        (logits, logsumexp, offsets, launch.scalar(layer), reach),
        (rows.of(padded, dtype=jnp.uint32), rows.of(padded), drawn),
        padded // config.share,
        name="rank_clusters",
        num_warps=config.share_warps,
    )
    ranked = RankedRefs(keys, sizes, offsets, budget.astype(jnp.int32), launch.scalar(layer))
    chunks = pl.cdiv(clusters, config.chunk)
    found: Lists | None = None
    if not config.in_registers:
        shapes = list_shapes(rows, clusters, chunks)
        bracket, number = call(
            functools.partial(_bracket, config=config, interpret=interpret),
            (ranked, drawn),
            (rows.of(2, dtype=jnp.uint32), shapes.number),
            1,
            name="bracket_clusters",
        )
        [lists] = call(
            functools.partial(_split, config=config, interpret=interpret),
            (ranked, bracket, number),
            (shapes._replace(end=None),),
            chunks,
            name="split_clusters",
            aliases={6: 3},
        )
        end = call(
            functools.partial(_end, config=config, interpret=interpret),
            (ranked, lists),
            shapes.end,
            1,
            name="find_last_cluster",
            num_warps=config.end_warps,
        )
        found = lists._replace(end=end)
    results = call(
        functools.partial(_list, config=config, interpret=interpret),
        (ranked, found),
        (
            rows.of(clusters, dtype=jnp.bool_),
            rows.of(clusters),
            rows.of(clusters + 1),
            rows.of(pl.cdiv(max_candidates, GRANULE)),
        ),
        chunks,
        name="list_clusters",
    )
    return Candidates(*results)
