"""`select_tokens` as two Triton kernels: one lists contenders, the other selects among them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import _pallas, _tuning
from pallas_kernels.select_clusters.reference import Candidates
from pallas_kernels.select_tokens._contenders import list_contenders
from pallas_kernels.select_tokens._rows import select_rows
from pallas_kernels.select_tokens.reference import Retrieved, RowTable


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        chunk: candidates that one program of the first kernel looks through.
        sample: candidates whose masses set its threshold.
        block: contenders, picked rows or slots that the second kernel looks at at once.
        chunk_warps, row_warps: the two kernels' `num_warps`, see Triton.
    """

    chunk: int = 4096
    sample: int = 2048
    block: int = 2048
    chunk_warps: int = 8
    row_warps: int = 16


def heuristic(candidates: int, max_tokens: int) -> Config:
    """A config for shapes that were not tuned."""
    chunk = min(4096, _pallas.tile(candidates, 32))
    block = max(64, min(2048, _pallas.tile(max_tokens + max_tokens // 2)))
    return Config(
        chunk,
        sample=min(2048, _pallas.tile(candidates, 32)),
        block=block,
        chunk_warps=max(1, min(8, chunk // 256)),
        row_warps=max(1, min(16, block // 128)),
    )


def select_tokens(
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
    config: Config | None = None,
    interpret: bool = False,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`."""
    batch, kv_heads, room = log_mass.shape
    clusters, slots = candidates.clusters.shape[-1], table.token_of_slot.shape[-1]
    config = config or _tuning.config(
        "select_tokens", heuristic(room, max_tokens), candidates=room, max_tokens=max_tokens
    )
    row = (batch, kv_heads)
    chunks = pl.cdiv(room, config.chunk)
    listed = _pallas.call(
        functools.partial(list_contenders, chunk=config.chunk, sample=config.sample),
        (log_mass, candidates.starts, budget.astype(jnp.int32)),
        (
            jax.ShapeDtypeStruct((*row, chunks, config.chunk), jnp.uint32),
            jax.ShapeDtypeStruct((*row, chunks, config.chunk), jnp.int32),
            jax.ShapeDtypeStruct((*row, chunks), jnp.int32),
        ),
        (chunks, batch * kv_heads),
        name="list_contenders",
        num_warps=config.chunk_warps,
        num_stages=1,
        interpret=interpret,
    )

    def of_rows(*shape: int, dtype: type = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*row, *shape), dtype)

    results = _pallas.call(
        functools.partial(
            select_rows,
            segment_tokens=segment_tokens,
            growth_tokens=growth_tokens,
            block=config.block,
            interpret=interpret,
        ),
        (
            *listed,
            *table,
            log_mass,
            candidates.clusters,
            candidates.starts,
            budget.astype(jnp.int32),
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
            of_rows(clusters),
            of_rows(),
            of_rows(),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*listed, *table)),
            # Scratch: prefix sums, contenders' keys and places, picked places, their clusters'
            # numbers, each cluster's first pick, victims.
            of_rows(chunks),
            of_rows(room, dtype=jnp.uint32),
            of_rows(room),
            of_rows(max_tokens),
            of_rows(max_tokens),
            of_rows(clusters),
            of_rows(slots),
        ),
        (batch * kv_heads,),
        name="select_rows",
        num_warps=config.row_warps,
        num_stages=1,
        aliases={i: 6 + i for i in range(6)},
        interpret=interpret,
    )
    tokens, row_slots, hit, remaining, hits, misses = results[:6]
    return Retrieved(tokens, row_slots, hit, remaining, RowTable(*results[9:12]), hits, misses)
