"""`select_tokens` as Triton kernels: few candidates contend, the best are picked and looked up."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import _pallas, _tuning
from pallas_kernels.select_clusters.reference import Candidates
from pallas_kernels.select_tokens._contenders import (
    estimate_threshold,
    list_contenders,
    most_expected,
)
from pallas_kernels.select_tokens._look_up import look_up_rows
from pallas_kernels.select_tokens._pick import pick_rows
from pallas_kernels.select_tokens.reference import Retrieved, RowTable, row_budgets


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        sample: candidates whose masses set the threshold.
        chunk: candidates that one program of the second kernel looks through.
        tile: contenders that the third kernel, one program a row, holds in registers.
        block: picked rows that a program of the fourth one looks up.
        sample_warps, chunk_warps, pick_warps, block_warps: the kernels' `num_warps`, see Triton.
    """

    sample: int = 4096
    chunk: int = 2048
    tile: int = 2048
    block: int = 512
    sample_warps: int = 16
    chunk_warps: int = 4
    pick_warps: int = 16
    block_warps: int = 16


# The most contenders whose keys and places fit in the registers of 32 warps.
MOST_IN_REGISTERS = 16384


def heuristic(candidates: int, max_tokens: int, *, cached: bool) -> Config:
    """A config for shapes that were not tuned.

    Args:
        candidates, max_tokens: room for candidates and for retrieved ones, a row.
        cached: whether there are slots: a row's last program then looks at all of them.
    """
    chunk = min(2048, _pallas.tile(candidates, 32))
    sample = min(_pallas.tile(candidates // 16, 32), 8192)
    tile = _pallas.tile(most_expected(max_tokens, candidates, sample), 32)
    tile = min(tile, MOST_IN_REGISTERS)
    block = (512 if max_tokens <= 8192 else 1024) if cached else 128
    block = min(block, _pallas.tile(max_tokens, 32))
    return Config(
        sample,
        chunk,
        tile=tile,
        block=block,
        sample_warps=max(1, min(16, sample // 256)),
        chunk_warps=max(1, min(4, chunk // 256)),
        pick_warps=max(1, min(32, tile // 128)),
        block_warps=min(block // 32, 16),
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
    admission_ratio: float = 1.0,
    config: Config | None = None,
    interpret: bool = False,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`: a threshold, contenders above it, the best of them."""
    batch, kv_heads, room = log_mass.shape
    clusters, slots = candidates.clusters.shape[-1], table.token_of_slot.shape[-1]
    config = config or _tuning.config(
        "select_tokens",
        heuristic(room, max_tokens, cached=slots > 0),
        rows=batch * kv_heads,
        candidates=room,
        max_tokens=max_tokens,
    )
    row, budget = (batch, kv_heads), row_budgets(budget, kv_heads)
    chunks = pl.cdiv(room, config.chunk)

    def of_rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*row, *shape), dtype)

    def call(kernel: Any, operands: Any, out_shape: Any, parts: int, **how: Any) -> Any:
        how = {"num_stages": 1, "interpret": interpret} | how
        return _pallas.call(kernel, operands, out_shape, (parts, batch * kv_heads), **how)

    lowest, done = call(
        functools.partial(estimate_threshold, sample=config.sample),
        (log_mass, candidates.starts, budget),
        (of_rows(dtype=jnp.uint32), of_rows()),
        1,
        name="estimate_threshold",
        num_warps=config.sample_warps,
    )
    *lists, sizes = call(
        functools.partial(list_contenders, chunk=config.chunk),
        (log_mass, candidates.starts, lowest, offsets, _pallas.scalar(layer)),
        (
            of_rows(chunks, config.chunk, dtype=jnp.uint32),
            of_rows(chunks, config.chunk),
            of_rows(chunks),
            of_rows(clusters),
        ),
        chunks,
        name="list_contenders",
        num_warps=config.chunk_warps,
    )
    choosy = slots > 0 and admission_ratio > 1
    picked, *rest = call(
        functools.partial(pick_rows, tile=config.tile, needs_least=choosy, interpret=interpret),
        (*lists, log_mass, candidates.starts, budget),
        (
            of_rows(max_tokens),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lists),
            *([of_rows(dtype=jnp.uint32)] if choosy else []),
            of_rows(chunks),  # scratch: the chunks' prefix sums
        ),
        1,
        name="pick_rows",
        num_warps=config.pick_warps,
        aliases={i: 1 + i for i in range(len(lists))},
    )
    # Of a cache without slots there are only the counters.
    kept = {name: field for name, field in table._asdict().items() if field.size}
    in_place = (sizes, done, *kept.values())
    parts = pl.cdiv(max_tokens, config.block)
    selected = (
        of_rows(max_tokens),
        of_rows(max_tokens),
        of_rows(max_tokens, dtype=jnp.bool_),
        of_rows(),
        of_rows(),
    )
    results = call(
        functools.partial(
            look_up_rows,
            segment_tokens=segment_tokens,
            growth_tokens=growth_tokens,
            block=config.block,
            threads=32 * config.block_warps,
            cached=slots > 0,
            admission_ratio=admission_ratio if choosy else 1.0,
            interpret=interpret,
        ),
        (
            *in_place,
            picked,
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
            *rest[len(lists) : -1],  # the least key, if it is asked for
        ),
        (
            *selected,
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place),
            # Scratch: hits by block, victims, and `Dropped`.
            of_rows(parts),
            of_rows(max(slots, 1)),
            *([of_rows(max_tokens), of_rows(3, parts)] if choosy else []),
        ),
        parts,
        name="look_up_rows",
        num_warps=config.block_warps,
        aliases={i: len(selected) + i for i in range(len(in_place))},
    )
    tokens, row_slots, hit, hits, misses, remaining = results[:6]
    table = table._replace(**dict(zip(kept, results[7 : 7 + len(kept)], strict=True)))
    return Retrieved(tokens, row_slots, hit, remaining, table, hits, misses)
