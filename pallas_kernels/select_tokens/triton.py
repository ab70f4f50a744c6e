"""`select_tokens` as Triton kernels: few candidates contend, the best are picked and looked up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.select_tokens._admit import Admit, admit_rows
from pallas_kernels.select_tokens._config import Config, heuristic
from pallas_kernels.select_tokens._contenders import (
    draw_sample,
    estimate_threshold,
    join_contenders,
    list_contenders,
)
from pallas_kernels.select_tokens._look_up import LookUp, look_up_rows
from pallas_kernels.select_tokens._pick import pick_rows
from pallas_kernels.select_tokens.reference import row_budgets
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.head_calls import HeadCalls
from pallas_kernels.types import (
    IndexedTokens,
    RankedTokens,
    Retrieved,
    RowTable,
    SelectionSettings,
)

__all__ = ["Config", "heuristic", "select_tokens"]

# How many of a sample a program draws, and how many contenders of a chunk it moves at once.
DRAWN = MOVED = 256


def select_tokens(
    ranked: RankedTokens,
    indexed: IndexedTokens,
    table: RowTable,
    layer: Array | int,
    step: Array,
    *,
    settings: SelectionSettings,
    config: Config | None = None,
    interpret: bool = False,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`: a threshold, contenders above it, the best of them."""
    offsets, token_ids, prompt_tokens = indexed
    log_mass, candidates, budget = ranked
    max_tokens = settings.max_tokens
    batch, kv_heads, room = log_mass.shape
    slots = table.token_of_slot.shape[-1]
    config = config or tuning.config(
        "select_tokens",
        heuristic(room, max_tokens),
        rows=batch * kv_heads,
        candidates=room,
        max_tokens=max_tokens,
    )
    rows, budget = HeadCalls((batch, kv_heads), interpret), row_budgets(budget, kv_heads)
    layer, step = launch.scalar(layer), launch.scalar(step)
    # Only then a pick may be left out.
    choosy = slots > 0 and settings.admission_ratio > 1
    masses = log_mass, candidates.starts
    lists, sizes = _contenders(rows, config, masses, budget, offsets, layer)
    picked, least = _pick(rows, config, masses, lists, budget, max_tokens, choosy)
    reads = {
        "picked": picked,
        "least": least,
        "log_mass": log_mass,
        "clusters": candidates.clusters,
        "starts": candidates.starts,
        "granules": candidates.granules,
        "budget": budget,
        "offsets": offsets,
        "token_ids": token_ids,
        "prompt_tokens": prompt_tokens,
        "layer": layer,
        "step": step,
    }
    look_up = functools.partial(
        look_up_rows,
        segment_tokens=settings.segment_tokens,
        growth_tokens=settings.growth_tokens,
        block=config.block,
        slots=slots,
        admission_ratio=settings.admission_ratio,
        interpret=interpret,
    )
    found = _look_up(rows, config, look_up, reads, sizes, table, settings.with_clusters)
    if slots:
        found |= _admit(rows, config, reads, found, table)
        kept = ("slot_of_token", "token_of_slot", "last_used", "hit_count", "miss_count")
        table = RowTable(*(found[name] for name in kept))
    else:
        found["hits"] = jnp.zeros(rows.shape, jnp.int32)
        table = table._replace(misses=found["miss_count"])
    names = ("tokens", "slots", "hit", "remaining", "hits", "misses")
    clusters = found.get("members_of")
    return Retrieved(table=table, **{name: found[name] for name in names}, clusters=clusters)


# Keys, places and counts of the contenders, by chunk.
Contenders = tuple[Array, Array, Array]


def _contenders(
    rows: HeadCalls,
    config: Config,
    masses: tuple[Array, Array],
    budget: Array,
    offsets: Array,
    layer: Array,
) -> tuple[Contenders, Array]:
    """Find the contenders of each row, and the clusters' sizes."""
    log_mass, starts = masses
    drawn = None
    if config.spread:
        block = min(DRAWN, config.sample)
        drawn = rows.call(
            functools.partial(draw_sample, sample=config.sample, block=block),
            (log_mass, starts),
            rows.of(config.sample, dtype=jnp.uint32),
            config.sample // block,
            name="draw_sample",
            num_warps=max(1, block // 64),
        )
    lowest = rows.call(
        functools.partial(
            estimate_threshold,
            sample=config.sample,
            threads=32 * config.sample_warps,
            interpret=rows.interpret,
        ),
        (log_mass, starts, budget, drawn),
        rows.of(dtype=jnp.uint32),
        1,
        name="estimate_threshold",
        num_warps=config.sample_warps,
    )
    chunks = pl.cdiv(log_mass.shape[-1], config.chunk)
    shape = chunks, config.chunk
    *lists, sizes = rows.call(
        functools.partial(
            list_contenders,
            chunk=config.chunk,
            threads=32 * config.chunk_warps,
            interpret=rows.interpret,
        ),
        (log_mass, starts, lowest, offsets, layer),
        (
            *(rows.of(*shape, dtype=jnp.uint32), rows.of(*shape), rows.of(chunks)),
            rows.of(offsets.shape[-1] - 1),
        ),
        chunks,
        name="list_contenders",
        num_warps=config.chunk_warps,
    )
    if config.spread:
        shape = 1, chunks * config.chunk
        lists = rows.call(
            functools.partial(join_contenders, block=min(MOVED, config.chunk)),
            lists,
            (rows.of(*shape, dtype=jnp.uint32), rows.of(*shape), rows.of(1)),
            chunks,
            name="join_contenders",
            num_warps=config.chunk_warps,
        )
    keys, places, counts = lists
    return (keys, places, counts), sizes


def _pick(
    rows: HeadCalls,
    config: Config,
    masses: tuple[Array, Array],
    lists: Contenders,
    budget: Array,
    max_tokens: int,
    needs_least: bool,
) -> tuple[Array, Array | None]:
    """Find the places of what is picked, rising, and the least key of these if it is needed."""
    pick = functools.partial(
        pick_rows,
        tile=config.tile,
        threads=32 * config.pick_warps,
        interpret=rows.interpret,
    )
    picked, _, _, least, _ = rows.call(
        pick,
        (*lists, *masses, budget),
        (
            rows.of(max_tokens),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lists[:2]),
            rows.of(dtype=jnp.uint32) if needs_least else None,
            rows.of(lists[-1].shape[-1]),  # scratch: the chunks' prefix sums
        ),
        1,
        name="pick_rows",
        num_warps=config.pick_warps,
        aliases={0: 1, 1: 2},
    )
    return picked, least


def _look_up(
    rows: HeadCalls,
    config: Config,
    look_up: functools.partial[None],
    reads: dict[str, Any],
    sizes: Array,
    table: RowTable,
    with_clusters: bool,
) -> dict[str, Array]:
    """Find what `look_up_rows` writes, by the names of `LookUp`."""
    max_tokens = reads["picked"].shape[-1]
    parts = pl.cdiv(max_tokens, config.block)
    in_place = {"remaining": sizes}
    writes = {
        "tokens": rows.of(max_tokens),
        "slots": rows.of(max_tokens),
        "hit": rows.of(max_tokens, dtype=jnp.bool_),
    }
    if with_clusters:
        writes["members_of"] = rows.of(max_tokens)
    if table.token_of_slot.shape[-1]:
        reads = reads | {"slot_of_token": table.slot_of_token}
        in_place["last_used"] = table.last_used
        writes["block_hits"] = rows.of(parts)
    else:
        in_place["miss_count"] = table.misses
        writes["misses"] = rows.of()
    if reads["least"] is not None:
        reads = reads | {"missed": table.misses}
        writes |= {"through": rows.of(max_tokens), "blocks": rows.of(3, parts)}
    warps = config.block_warps
    return rows.call_by_name(look_up, LookUp, reads, in_place, writes, parts, num_warps=warps)


def _admit(
    rows: HeadCalls,
    config: Config,
    given: dict[str, Any],
    found: dict[str, Array],
    table: RowTable,
) -> dict[str, Array]:
    """Find what `admit_rows` writes, by the names of `Admit`."""
    reads: dict[str, Any] = {name: found[name] for name in ("tokens", "hit", "block_hits")}
    reads |= {name: given[name] for name in ("starts", "budget", "layer", "step")}
    in_place = {
        "slots": found["slots"],
        "slot_of_token": table.slot_of_token,
        "token_of_slot": table.token_of_slot,
        "last_used": found["last_used"],
        "hit_count": table.hits,
        "miss_count": table.misses,
    }
    if given["least"] is not None:
        reads["blocks"], in_place["remaining"] = found["blocks"], found["remaining"]
    slots, warps = table.token_of_slot.shape[-1], config.slot_warps
    writes = {"hits": rows.of(), "misses": rows.of(), "victims": rows.of(slots)}
    admit = functools.partial(
        admit_rows,
        candidates=given["log_mass"].shape[-1],
        threads=32 * warps,
        interpret=rows.interpret,
    )
    return rows.call_by_name(admit, Admit, reads, in_place, writes, 1, num_warps=warps)
