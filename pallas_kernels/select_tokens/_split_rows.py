"""`select_tokens` with several programs a row: where rows are few, and long."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels._split import DEVIATIONS, SPARE, list_shapes
from pallas_kernels.select_clusters.reference import Candidates
from pallas_kernels.select_tokens._pick import (
    bracket_tokens,
    end_tokens,
    pick_tokens,
    split_tokens,
)
from pallas_kernels.select_tokens.reference import Retrieved, RowTable


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """How the work is cut.

    Attributes:
        sample: candidates whose masses tell which contend for the last places.
        chunk: candidates that a program of the kernels with several a row looks through.
        tile: contenders that stay in registers.
        block: picked rows, or slots, that a program looks up at once.
        sample_warps, chunk_warps, tile_warps: `num_warps` of the kernel that draws the sample, of
            those with several programs a row, and of the one with the contenders; see Triton.
    """

    sample: int = 2048
    chunk: int = 2048
    tile: int = 2048
    block: int = 128
    sample_warps: int = 8
    chunk_warps: int = 4
    tile_warps: int = 8


# The most contenders whose keys and places fit in the registers of 16 warps.
MOST_IN_REGISTERS = 16384


def split_rows(rows: int, candidates: int, max_tokens: int) -> SplitRows:
    """A config for shapes that were not tuned."""
    whole = _pallas.tile(candidates, 32)
    sample = min(max(whole // 16, 32), 2048 if candidates <= 2**16 else 4096)
    tile = min(_pallas.tile(_most_expected(max_tokens, candidates, sample), 32), MOST_IN_REGISTERS)
    # A few programs for each processor of a large GPU.
    chunk = min(max(_pallas.tile(rows * candidates // 1536), 1024), 4096, whole)
    warps = max(1, min(4 if chunk <= 2048 else 8, chunk // 128))
    return SplitRows(
        sample,
        chunk,
        tile,
        block=32 * warps,
        sample_warps=max(1, min(8, sample // 128)),
        chunk_warps=warps,
        tile_warps=max(1, min(16, tile // 256)),
    )


def _most_expected(budget: int, candidates: int, sample: int) -> int:
    """How many contenders of so many candidates there are at most, but for rare samples."""
    stride = candidates / sample
    wide = 2 * (DEVIATIONS * math.sqrt(budget / stride) + SPARE)
    return min(candidates, math.ceil((wide + 3 * math.sqrt(wide)) * stride))


def select_in_split_rows(
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
    config: SplitRows,
    interpret: bool,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`: `_split` says how a row is shared."""
    batch, kv_heads, room = log_mass.shape
    clusters, slots = candidates.clusters.shape[-1], table.token_of_slot.shape[-1]
    rows = (batch, kv_heads)
    chunks = pl.cdiv(room, config.chunk)

    def of_rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*rows, *shape), dtype)

    def call(kernel: Any, operands: Any, out_shape: Any, parts: int, **how: Any) -> Any:
        how = {"num_warps": config.chunk_warps, "num_stages": 1} | how
        kernel = functools.partial(kernel, interpret=interpret)
        grid = (parts, batch * kv_heads)
        return _pallas.call(kernel, operands, out_shape, grid, **how, interpret=interpret)

    scored = (log_mass, candidates.starts, budget)
    shapes = list_shapes(rows, room, chunks, weighted=False)
    bracket, number, done = call(
        functools.partial(bracket_tokens, most=max_tokens, sample=config.sample),
        scored,
        (of_rows(2, dtype=jnp.uint32), shapes.number, of_rows()),
        1,
        name="bracket_tokens",
        num_warps=config.sample_warps,
    )
    *lists, left_keys, left_places, left, sizes = call(
        functools.partial(split_tokens, most=max_tokens),
        (*scored, offsets, _pallas.scalar(layer), bracket, number),
        (
            *(shapes.keys, shapes.places, shapes.number, shapes.sure),
            of_rows(chunks, config.chunk, dtype=jnp.uint32),
            of_rows(chunks, config.chunk),
            of_rows(chunks),
            of_rows(clusters),
        ),
        chunks,
        name="split_tokens",
        aliases={6: 2},
    )
    end = call(
        functools.partial(end_tokens, most=max_tokens, tile=config.tile),
        (*scored, *lists),
        shapes.end,
        1,
        name="find_last_token",
        num_warps=config.tile_warps,
    )
    operands = (
        *(*scored, candidates.clusters, candidates.granules, offsets, token_ids, prompt_tokens),
        *(_pallas.scalar(layer), _pallas.scalar(step), *lists, end, left_keys, left_places, left),
    )
    # Of a cache without slots there are only the counters.
    kept = {name: field for name, field in table._asdict().items() if field.size}
    in_place = (sizes, *kept.values(), done)
    selected = (
        of_rows(max_tokens),
        of_rows(max_tokens),
        of_rows(max_tokens, dtype=jnp.bool_),
        of_rows(),
        of_rows(),
    )
    # The picks' clusters' numbers, where each one's picks begin, hits by chunk, victims.
    scratch = (of_rows(max_tokens), of_rows(clusters), of_rows(chunks), of_rows(max(slots, 1)))
    results = call(
        functools.partial(
            pick_tokens,
            chunk=config.chunk,
            block=config.block,
            segment_tokens=segment_tokens,
            growth_tokens=growth_tokens,
            cached=slots > 0,
        ),
        (*operands, *in_place),
        (*selected, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place), *scratch),
        chunks,
        name="pick_tokens",
        aliases={len(operands) + i: len(selected) + i for i in range(len(in_place))},
    )
    tokens, row_slots, hit, hits, misses, remaining = results[: len(selected) + 1]
    fields = results[len(selected) + 1 :][: len(kept)]
    table = table._replace(**dict(zip(kept, fields, strict=True)))
    return Retrieved(tokens, row_slots, hit, remaining, table, hits, misses)
