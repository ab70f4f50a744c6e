"""One program a row: exact selection among contenders."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import ordered_bits
from pallas_kernels._pairs import halves, list_selected
from pallas_kernels._row import Row
from pallas_kernels._search import last_key

# Contenders that follow each other and are one thread's: one sum over the threads serves all of
# them, and more would lie too far apart to be read together.
RUN = 4


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
    row: Row,
    lists: tuple[Any, Any, Any],
    prefix_ref: Any,
    budget: Any,
    out: tuple[Any, Any | None],
    tile: int,
    threads: int,
) -> None:
    """Writes the places of the contenders of the `budget` largest keys, rising, and the least key.

    Args:
        lists: keys, places and counts, by chunk.
        out: where places are written, and the least of their keys if it is asked for.
        prefix_ref: `[batch, kv_heads, chunks]` int32, scratch.
        tile: so many contenders are held in registers; if there are more, each round of the
            bisection reads them again.
        threads: of the program.
    """
    (keys_ref, places_ref, counts_ref), (out_ref, least_ref) = lists, out
    chunks = keys_ref.shape[-2]
    nth = jnp.arange(_pallas.tile(chunks))
    counts = row.load(counts_ref, nth, mask=nth < chunks)
    count = jnp.sum(counts)
    if chunks > 1:
        row.store(prefix_ref, jnp.cumsum(counts) - counts, nth, mask=nth < chunks)
        row.barrier()

    def find(i: Any) -> tuple[Any, Callable[[], Any]]:
        """Of the i-th contenders of all chunks the key, zero where there is none, and the place."""
        exists, at = i < count, (jnp.int32(0), i)
        if chunks > 1:
            # Of chunks that share a prefix, all but the last are empty: the search finds that one.
            part = row.search(prefix_ref, chunks, i, exists)
            at = (part, i - row.load(prefix_ref, part, mask=exists))
        key = row.load(keys_ref, *at, mask=exists)
        if chunks == 1:
            # Read where it is asked for, it takes no registers until then.
            return key, lambda: row.load(places_ref, *at, mask=exists)
        place = row.load(places_ref, *at, mask=exists)
        return key, lambda: place

    def pick(each: Any) -> None:
        def widen(key: Any, _: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = state
            least = jnp.min(jnp.where(key > 0, key, jnp.uint32(2**32 - 1)))
            return jnp.minimum(low, least), jnp.maximum(high, jnp.max(key))

        low, high = each(widen, (jnp.uint32(2**32 - 1), jnp.uint32(0)))

        def held(bound: Any) -> Any:
            def add(key: Any, _: Any, held: Any) -> Any:
                return held + jnp.sum((key >= bound).astype(jnp.int32))

            return each(add, jnp.int32(0))

        bound, above = threshold(held, budget, low, high + jnp.uint32(1))

        Picked = tuple[tuple[Any, Any], Any]

        def write(key: Any, place: Callable[[], Any], state: Picked) -> Picked:
            before, least = state
            larger, ties = key > bound, key == bound
            picked, at, before = list_selected(larger, ties, budget - above, before)
            row.store(out_ref, place(), at, mask=picked)
            if least_ref is not None:
                key = jnp.where(picked, key, jnp.uint32(2**32 - 1))
                least = jnp.minimum(least, jnp.min(key))
            return before, least

        _, least = each(write, ((jnp.int32(0), jnp.int32(0)), jnp.uint32(2**32 - 1)))
        if least_ref is not None:
            row.store(least_ref, least)

    @pl.when(count <= tile)
    def pick_in_registers() -> None:
        run = min(max(tile // threads, 1), RUN)
        block = run * jnp.arange(threads)
        blocks = [
            [find(first + block + j) for j in range(run)] for first in range(0, tile, run * threads)
        ]
        keys = [key for of_block in blocks for key, _ in of_block]
        end = last_key(keys, None, budget, interpret=row.interpret)
        wanted, before = budget - end.above, jnp.int32(0)
        for i, of_block in enumerate(blocks):
            marks = [(key > end.key, key == end.key) for key, _ in of_block]
            pairs = [
                above.astype(jnp.int32) | (tied.astype(jnp.int32) << 16) for above, tied in marks
            ]
            own = functools.reduce(jnp.add, pairs)
            befores = itertools.accumulate(
                pairs[:-1], jnp.add, initial=before + jnp.cumsum(own) - own
            )
            for (_, place), (above, tied), pair in zip(of_block, marks, befores, strict=True):
                above_before, ties_before = halves(pair)
                picked = above | (tied & (ties_before < wanted))
                at = above_before + jnp.minimum(ties_before, wanted)
                row.store(out_ref, place(), at, mask=picked)
            if i + 1 < len(blocks):
                before += jnp.sum(own)
        if least_ref is not None:
            here = jnp.full(threads, row.b), jnp.full(threads, row.h)
            plt.store(least_ref.at[here], end.key)

    @pl.when(count > tile)
    def pick_in_memory() -> None:
        def each(visit: Any, state: Any) -> Any:
            def of_block(i: Any, state: Any) -> Any:
                return visit(*find(i * tile + jnp.arange(tile)), state)

            return lax.fori_loop(0, lax.div(count + (tile - 1), jnp.int32(tile)), of_block, state)

        pick(each)


def pick_rows(*refs: Any, tile: int, threads: int, needs_least: bool, interpret: bool) -> None:
    """Lists one row's best contenders: which candidates are retrieved.

    Refs:
        keys, places, counts: from `list_contenders`, written in place.
        log_mass: `[batch, kv_heads, candidates]` float32.
        starts: `Candidates.starts`.
        budget: `[batch, kv_heads]` int32.
        picked: `[batch, kv_heads, max_tokens]` int32, out: the places, rising.
        least: `[batch, kv_heads]` uint32, out if `needs_least`: the least key that is picked.
        prefix: `[batch, kv_heads, chunks]` int32, scratch.
    """
    log_mass_ref, starts_ref, budget_ref, picked_ref, *lists = refs[3:-1]
    prefix_ref, least_ref = refs[-1], lists.pop() if needs_least else None
    row = Row(
        pl.program_id(1), log_mass_ref.shape[1], None, interpret=interpret, block=min(tile, 2048)
    )
    rooms = log_mass_ref.shape[-1], picked_ref.shape[-1]
    total, budget = limits(row, starts_ref, budget_ref, rooms)
    counts_ref = lists[2]
    nth = jnp.arange(_pallas.tile(counts_ref.shape[-1]))
    found = jnp.sum(row.load(counts_ref, nth, mask=nth < counts_ref.shape[-1]))

    @pl.when(found < budget)
    def take_all() -> None:
        _take_all(row, tuple(lists), log_mass_ref, total)

    @pl.when(budget > 0)
    def pick() -> None:
        _pick(row, tuple(lists), prefix_ref, budget, (picked_ref, least_ref), tile, threads)


def limits(row: Row, starts_ref: Any, budget_ref: Any, rooms: tuple[int, int]) -> tuple[Any, Any]:
    """A row's candidates, and how many of them are retrieved: int32 both.

    Args:
        row: whose.
        starts_ref: `Candidates.starts`.
        budget_ref: `[batch, kv_heads]` int32.
        rooms: for candidates, and for retrieved ones.
    """
    total = row.load(starts_ref, jnp.int32(starts_ref.shape[-1] - 1))
    total = jnp.minimum(total, rooms[0])
    return total, jnp.minimum(jnp.minimum(row.load(budget_ref), total), rooms[1])
