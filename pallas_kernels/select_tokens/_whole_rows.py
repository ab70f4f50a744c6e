"""`select_tokens` with one program a row in the end: where rows are many, or short."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels.select_clusters.reference import Candidates
from pallas_kernels.select_tokens._contenders import (
    estimate_threshold,
    list_contenders,
    most_expected,
)
from pallas_kernels.select_tokens._rows import select_rows
from pallas_kernels.select_tokens.reference import Retrieved, RowTable


@dataclasses.dataclass(frozen=True)
class WholeRows:
    """How the work is cut.

    Attributes:
        sample: candidates whose masses set the threshold.
        chunk: candidates that one program of the second kernel looks through.
        tile: contenders that the third kernel holds in registers.
        block: picked rows, or slots, that it looks at at once.
        sample_warps, chunk_warps, row_warps: the three kernels' `num_warps`, see Triton.
    """

    sample: int = 4096
    chunk: int = 2048
    tile: int = 2048
    block: int = 2048
    sample_warps: int = 16
    chunk_warps: int = 4
    row_warps: int = 16


# The most contenders whose keys and places fit in the registers of 32 warps.
MOST_IN_REGISTERS = 16384


def whole_rows(candidates: int, max_tokens: int) -> WholeRows:
    """A config for shapes that were not tuned."""
    chunk = min(2048, _pallas.tile(candidates, 32))
    sample = min(_pallas.tile(candidates // 16, 32), 8192)
    tile = _pallas.tile(most_expected(max_tokens, candidates, sample), 32)
    tile = min(tile, MOST_IN_REGISTERS)
    return WholeRows(
        sample,
        chunk,
        tile=tile,
        block=max(32, min(2048, _pallas.tile(max_tokens))),
        sample_warps=max(1, min(16, sample // 256)),
        chunk_warps=max(1, min(4, chunk // 256)),
        row_warps=max(1, min(32, tile // 128)),
    )


def select_in_whole_rows(
    log_mass: Array,
    candidates: Candidates,
    budget: Array,
    offsets: Array,
    token_ids: Array,
    prompt_tokens: Array,
    table: RowTable,
    layer: Array | int,
    step: Array,
    *,
    max_tokens: int,
    segment_tokens: int,
    growth_tokens: int,
    config: WholeRows,
    interpret: bool,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`: a threshold, contenders above it, the best of them."""
    batch, kv_heads, room = log_mass.shape
    clusters, slots = candidates.clusters.shape[-1], table.token_of_slot.shape[-1]
    row = (batch, kv_heads)
    chunks = pl.cdiv(room, config.chunk)

    def of_rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*row, *shape), dtype)

    lowest = _pallas.call(
        functools.partial(estimate_threshold, sample=config.sample),
        (log_mass, candidates.starts, budget),
        of_rows(dtype=jnp.uint32),
        (batch * kv_heads,),
        name="estimate_threshold",
        num_warps=config.sample_warps,
        num_stages=1,
        interpret=interpret,
    )
    *lists, sizes = _pallas.call(
        functools.partial(list_contenders, chunk=config.chunk),
        (log_mass, candidates.starts, lowest, offsets, _pallas.scalar(layer)),
        (
            of_rows(chunks, config.chunk, dtype=jnp.uint32),
            of_rows(chunks, config.chunk),
            of_rows(chunks),
            of_rows(clusters),
        ),
        (chunks, batch * kv_heads),
        name="list_contenders",
        num_warps=config.chunk_warps,
        num_stages=1,
        interpret=interpret,
    )
    # Of a cache without slots there are only the counters.
    kept = {name: field for name, field in table._asdict().items() if field.size}
    in_place = (*lists, sizes, *kept.values())
    results = _pallas.call(
        functools.partial(
            select_rows,
            segment_tokens=segment_tokens,
            growth_tokens=growth_tokens,
            block=config.block,
            tile=config.tile,
            cached=slots > 0,
            interpret=interpret,
        ),
        (
            *in_place,
            log_mass,
            candidates.clusters,
            candidates.starts,
            candidates.granules,
            budget,
            offsets,
            token_ids,
            prompt_tokens,
            _pallas.scalar(layer),
            _pallas.scalar(step),
        ),
        (
            of_rows(max_tokens),
            of_rows(max_tokens),
            of_rows(max_tokens, dtype=jnp.bool_),
            of_rows(),
            of_rows(),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place),
            # Scratch: the chunks' prefix sums, picked places, their clusters' numbers, each
            # cluster's first pick, victims.
            of_rows(chunks),
            of_rows(max_tokens),
            of_rows(max_tokens),
            of_rows(clusters),
            of_rows(max(slots, 1)),
        ),
        (batch * kv_heads,),
        name="select_rows",
        num_warps=config.row_warps,
        num_stages=1,
        aliases={i: 5 + i for i in range(len(in_place))},
        interpret=interpret,
    )
    tokens, row_slots, hit, hits, misses = results[:5]
    remaining, fields = results[8], results[9 : 9 + len(kept)]
    table = table._replace(**dict(zip(kept, fields, strict=True)))
    return Retrieved(tokens, row_slots, hit, remaining, table, hits, misses)
