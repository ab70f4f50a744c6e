"""One program a row: exact selection among contenders, slots, and the row table's update."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import NO_ID, ordered_bits
from pallas_kernels._pairs import list_selected
from pallas_kernels._row import Row
from pallas_kernels.score_tokens._members import find_members
from pallas_kernels.select_tokens._admit import admit, count_rows


def _take_all(row: Row, lists: tuple[Any, Any, Any], log_mass_ref: Any, total: Any) -> None:
    """Makes every candidate a contender: where too few are, the sample misled."""
    keys_ref, places_ref, counts_ref = lists
    chunks, chunk = keys_ref.shape[-2:]

    def copy(place: Any, exists: Any, _: Any) -> None:
        part = lax.div(place, jnp.int32(chunk))
        key = ordered_bits(row.load(log_mass_ref, place, mask=exists))
        row.store(keys_ref, key, part, place - part * chunk, mask=exists)
        row.store(places_ref, place, part, place - part * chunk, mask=exists)

    row.each(total, copy)
    nth = jnp.arange(_pallas.tile(chunks))
    row.store(counts_ref, jnp.clip(total - nth * chunk, 0, chunk), nth, mask=nth < chunks)
    row.barrier()


def _pick(
    row: Row, lists: tuple[Any, Any, Any], prefix_ref: Any, budget: Any, out_ref: Any, tile: int
) -> None:
    """Writes the places of the contenders of the `budget` largest keys to out_ref, rising.

    Args:
        lists: keys, places and counts, by chunk.
        prefix_ref: `[batch, kv_heads, chunks]` int32, scratch.
        tile: so many contenders are held in registers; if there are more, each round of the
            bisection reads them again.
    """
    keys_ref, places_ref, counts_ref = lists
    chunks = keys_ref.shape[-2]
    nth = jnp.arange(_pallas.tile(chunks))
    counts = row.load(counts_ref, nth, mask=nth < chunks)
    count = jnp.sum(counts)
    row.store(prefix_ref, jnp.cumsum(counts) - counts, nth, mask=nth < chunks)
    row.barrier()

    def find(i: Any) -> tuple[Any, Any, Any]:
        """Whether there is an i-th contender of all chunks, its key and its place."""
        exists = i < count
        # Of chunks that share a prefix, all but the last are empty: the search finds that one.
        part = row.search(prefix_ref, chunks, i, exists)
        at = (part, i - row.load(prefix_ref, part, mask=exists))
        return exists, row.load(keys_ref, *at, mask=exists), row.load(places_ref, *at, mask=exists)

    def pick(each: Any) -> None:
        def widen(exists: Any, key: Any, _: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = state
            least = jnp.min(jnp.where(exists, key, jnp.uint32(2**32 - 1)))
            return jnp.minimum(low, least), jnp.maximum(high, jnp.max(key))

        low, high = each(widen, (jnp.uint32(2**32 - 1), jnp.uint32(0)))

        def held(bound: Any) -> Any:
            def add(exists: Any, key: Any, _: Any, held: Any) -> Any:
                return held + jnp.sum((exists & (key >= bound)).astype(jnp.int32))

            return each(add, jnp.int32(0))

        bound, above = threshold(held, budget, low, high + jnp.uint32(1))

        def write(exists: Any, key: Any, place: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            larger, ties = exists & (key > bound), exists & (key == bound)
            picked, at, state = list_selected(larger, ties, budget - above, state)
            row.store(out_ref, place, at, mask=picked)
            return state

        each(write, (jnp.int32(0), jnp.int32(0)))

    @pl.when(count <= tile)
    def pick_in_registers() -> None:
        contenders = find(jnp.arange(tile))
        pick(lambda visit, state: visit(*contenders, state))

    @pl.when(count > tile)
    def pick_in_memory() -> None:
        def each(visit: Any, state: Any) -> Any:
            def of_block(i: Any, state: Any) -> Any:
                return visit(*find(i * tile + jnp.arange(tile)), state)

            return lax.fori_loop(0, lax.div(count + (tile - 1), jnp.int32(tile)), of_block, state)

        pick(each)

    row.barrier()


def _count_remaining(
    row: Row, numbers_ref: Any, firsts_ref: Any, clusters_ref: Any, remaining_ref: Any, count: Any
) -> None:
    """Takes the picked tokens off their clusters' sizes, which `remaining_ref` holds.

    They are listed by cluster, so a cluster's share is the length of a run: no atomics.
    """

    def edge(i: Any, exists: Any, other: Any) -> tuple[Any, Any]:
        number = row.load(numbers_ref, i, mask=exists)
        within = exists & (other >= 0) & (other < count)
        return number, exists & (~within | (row.load(numbers_ref, other, mask=within) != number))

    def mark(i: Any, exists: Any, _: Any) -> None:
        number, first = edge(i, exists, i - 1)
        row.store(firsts_ref, i, number, mask=first)

    def subtract(i: Any, exists: Any, _: Any) -> None:
        number, last = edge(i, exists, i + 1)
        cluster = row.load(clusters_ref, number, mask=last)
        run = i + 1 - row.load(firsts_ref, number, mask=last)
        row.store(
            remaining_ref, row.load(remaining_ref, cluster, mask=last) - run, cluster, mask=last
        )

    row.each(count, mark)
    row.barrier()
    row.each(count, subtract)


def select_rows(
    *refs: Any,
    segment_tokens: int,
    growth_tokens: int,
    block: int,
    tile: int,
    cached: bool,
    interpret: bool,
) -> None:
    """One row's selection among its contenders; `select_tokens` says what the refs are."""
    # The first ones are written in place: only the results' refs are used.
    fields = 5 if cached else 2
    refs = refs[4 + fields :]
    log_mass_ref, clusters_ref, starts_ref, granules_ref, budget_ref, *operands = refs[:10]
    offsets_ref, token_ids_ref, prompt_tokens_ref, layer_ref, step_ref = operands
    tokens_ref, slots_ref, hit_ref, hits_ref, misses_ref = refs[10:15]
    lists, remaining_ref, table = refs[15:18], refs[18], refs[19 : 19 + fields]
    prefix_ref, picked_ref, numbers_ref, firsts_ref, victims_ref = refs[19 + fields :]
    kv_heads = log_mass_ref.shape[1]
    program = pl.program_id(0)
    layer, step = layer_ref[...], step_ref[...]
    row = Row(program, kv_heads, layer, interpret=interpret, block=block)
    total = row.load(starts_ref, jnp.int32(clusters_ref.shape[-1]))
    total = jnp.minimum(total, log_mass_ref.shape[-1])
    room = tokens_ref.shape[-1]
    budget = jnp.minimum(jnp.minimum(row.load(budget_ref), total), room)

    nth = jnp.arange(_pallas.tile(lists[2].shape[-1]))
    found = jnp.sum(row.load(lists[2], nth, mask=nth < lists[2].shape[-1]))

    @pl.when(found < budget)
    def take_all() -> None:
        _take_all(row, lists, log_mass_ref, total)

    @pl.when(budget > 0)
    def pick() -> None:
        _pick(row, lists, prefix_ref, budget, picked_ref, tile)

    prompt = plt.load(prompt_tokens_ref.at[row.b])

    def look_up(i: Any, exists: Any, hits: Any) -> Any:
        valid = i < budget
        place = row.load(picked_ref, i, mask=valid)
        number, _, position = find_members(
            clusters_ref, starts_ref, granules_ref, offsets_ref, layer, row.b, row.h, place, valid
        )
        in_prompt = lax.div(position, jnp.int32(segment_tokens)) * segment_tokens
        grown = lax.div(position - prompt, jnp.int32(growth_tokens)) * growth_tokens
        start = jnp.where(position < prompt, in_prompt, prompt + grown)
        token = start + row.load(token_ids_ref, position, mask=valid, stacked=True).astype(
            jnp.int32
        )
        row.store(numbers_ref, number, i, mask=valid)
        row.store(tokens_ref, jnp.where(valid, token, NO_ID), i, mask=exists)
        if not cached:
            row.store(slots_ref, jnp.full_like(i, NO_ID), i, mask=exists)
            row.store(hit_ref, jnp.zeros(i.shape, bool), i, mask=exists)
            return hits
        slot = row.load(table[0], token, mask=valid, stacked=True)
        hit = valid & (slot >= 0)
        row.store(slots_ref, jnp.where(hit, slot, NO_ID), i, mask=exists)
        row.store(hit_ref, hit, i, mask=exists)
        row.store(table[2], jnp.full_like(i, step), slot, mask=hit, stacked=True)
        return hits + jnp.sum(hit.astype(jnp.int32))

    hits = row.each(jnp.int32(room), look_up, jnp.int32(0))
    row.barrier()
    _count_remaining(row, numbers_ref, firsts_ref, clusters_ref, remaining_ref, budget)
    if cached:
        out = tokens_ref, slots_ref, hit_ref
        admit(row, table, out, victims_ref, (budget, hits), step)
    count_rows(row, table, (hits_ref, misses_ref), (hits, budget - hits))
