"""The last part of `select_clusters`: a chunk's selected clusters are listed."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.toolbox.block_sums import scan_together
from pallas_kernels.toolbox.head_view import HeadView
from pallas_kernels.toolbox.sampled_split import Load, places_of_threads
from pallas_kernels.toolbox.selection_end import End
from pallas_kernels.types import GRANULE, NO_ID

# Clusters that follow each other and are one thread's; more would lie too far apart to be written
# together.
RUN = 4


def list_chunk(
    row: HeadView,
    load: Load,
    end: End,
    some: Any,
    refs: tuple[Any, Any, Any, Any],
    *,
    chunk: int,
    threads: int,
) -> None:
    """List a chunk's selected clusters, from where those of the chunks before it end.

    Args:
        row: whose clusters.
        load: reads their keys and sizes.
        end: where the selection ends.
        some: bool, whether anything is selected.
        refs: what is written, as `Candidates` has it.
        chunk: clusters that are a program's.
        threads: of the program.
    """
    selected_ref, clusters_ref, starts_ref, granules_ref = refs
    part, clusters = pl.program_id(0), selected_ref.shape[-1]
    count, tokens = jnp.where(some, end.count, 0), jnp.where(some, end.weight, 0)
    first, granules, lane = part * chunk, granules_ref.shape[-1], jnp.arange(threads)
    # A run of clusters a thread, so that one sum over the threads serves all of them.
    run = min(max(chunk // threads, 1), RUN)
    blocks = pl.cdiv(chunk, run * threads)

    def list_block(i: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
        nths = [(i * threads + lane) * run + j for j in range(run)]
        cs = [first + nth for nth in nths]
        exist = [(nth < chunk) & (c < clusters) for nth, c in zip(nths, cs, strict=True)]
        kept = []
        for c, exists in zip(cs, exist, strict=True):
            keys, sizes = load(c, exists)
            kept.append(jnp.where(some & end.selects(keys, c), sizes, 0))
        numbers = [(size > 0).astype(jnp.int32) for size in kept]
        own = [functools.reduce(jnp.add, x) for x in (numbers, kept)]
        (number_before, number), (kept_before, tokens_kept) = scan_together(
            own, interpret=row.interpret
        )
        places = itertools.accumulate(numbers[:-1], jnp.add, initial=before[0] + number_before)
        starts = itertools.accumulate(kept[:-1], jnp.add, initial=before[1] + kept_before)
        listed = list(zip(kept, places, starts, strict=True))
        for c, exists, (size, place, start) in zip(cs, exist, listed, strict=True):
            row.store(selected_ref, size > 0, c, mask=exists)
            row.store(clusters_ref, c, place, mask=size > 0)
            row.store(starts_ref, start, place, mask=size > 0)
            # Past the lists' ends each program fills its share.
            rest = exists & (c >= count)
            row.store(clusters_ref, jnp.full_like(c, NO_ID), c, mask=rest)
            row.store(starts_ref, tokens, c, mask=rest)

        def write_granule(j: Any, _: Any) -> None:
            for size, place, start in listed:
                granule = lax.div(start + (GRANULE - 1), jnp.int32(GRANULE)) + j
                begins = (granule * GRANULE < start + size) & (granule < granules)
                row.store(granules_ref, place, granule, mask=(size > 0) & begins)

        largest = jnp.max(functools.reduce(jnp.maximum, kept))
        lax.fori_loop(0, lax.div(largest, jnp.int32(GRANULE)) + 1, write_granule, None)
        return before[0] + number, before[1] + tokens_kept

    zero = jnp.zeros(threads, jnp.int32)
    lax.fori_loop(0, blocks, list_block, (zero + end.before, zero + end.before_weight))
    row.store(starts_ref, tokens, jnp.full(threads, clusters), mask=lane == 0)
    share = pl.cdiv(granules, pl.cdiv(clusters, chunk))
    for nth in places_of_threads(share, threads):
        granule = part * share + nth
        rest = (nth < share) & (granule < granules) & (granule * GRANULE >= tokens)
        row.store(granules_ref, jnp.maximum(count - 1, 0), granule, mask=rest)
