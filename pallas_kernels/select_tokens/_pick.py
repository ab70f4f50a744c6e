"""One program a row: exact selection among contenders."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.numerics import ordered_bits
from pallas_kernels.toolbox import launch, warp
from pallas_kernels.toolbox.bisection import threshold
from pallas_kernels.toolbox.block_select import last_key
from pallas_kernels.toolbox.block_sums import scan_together
from pallas_kernels.toolbox.head_view import HeadView
from pallas_kernels.toolbox.packed_counts import halves, list_selected

# Contenders that follow each other and are one thread's: one sum over the threads serves all of
# them, and more would lie too far apart to be read together.
RUN = 4

LARGEST = 2**32 - 1  # of keys


def _take_all(row: HeadView, lists: tuple[Any, Any], log_mass_ref: Any, total: Any) -> None:
    """Make every candidate a contender: where too few are, the sample misled."""
    keys_ref, places_ref = lists
    chunk = keys_ref.shape[-1]

    def copy(place: Any, exists: Any, _: Any) -> None:
        part = lax.div(place, jnp.int32(chunk))
        key = ordered_bits(row.load(log_mass_ref, place, mask=exists))
        row.store(keys_ref, key, part, place - part * chunk, mask=exists)
        row.store(places_ref, place, part, place - part * chunk, mask=exists)

    row.each(total, copy)
    row.barrier()


class _Contenders(NamedTuple):
    """A row's contenders, by chunk.

    Attributes:
        row: whose.
        keys_ref, places_ref: `[batch, kv_heads, chunks, chunk]`, from `list_contenders`.
        prefix_ref: `[batch, kv_heads, chunks]` int32: how many come before each chunk's, if there
            are several.
        count: int32, of all chunks.
    """

    row: HeadView
    keys_ref: Any
    places_ref: Any
    prefix_ref: Any
    count: Any

    @property
    def chunks(self) -> int:
        return int(self.keys_ref.shape[-2])

    def count_before(self, counts: Any) -> None:
        """Write how many come before each chunk's, given how many each has."""
        nth = jnp.arange(counts.shape[0])
        if self.chunks > 1:
            before = jnp.cumsum(counts) - counts
            self.row.store(self.prefix_ref, before, nth, mask=nth < self.chunks)
            self.row.barrier()

    def find(self, vectors: list[Any]) -> list[tuple[Any, Callable[[], Any]]]:
        """Of the i-th contenders of all chunks the key, zero where there is none, and the place."""
        row, exist = self.row, [i < self.count for i in vectors]
        if self.chunks > 1:
            # Of chunks that share a prefix, all but the last are empty: the search finds that one.
            parts = row.search(self.prefix_ref, self.chunks, vectors, exist)
            firsts = [
                row.load(self.prefix_ref, part, mask=mask)
                for part, mask in zip(parts, exist, strict=True)
            ]
            ats = [(part, i - x) for part, i, x in zip(parts, vectors, firsts, strict=True)]
        else:
            ats = [(jnp.int32(0), i) for i in vectors]
        keys = [
            row.load(self.keys_ref, *at, mask=mask) for at, mask in zip(ats, exist, strict=True)
        ]

        def read(nth: int) -> Any:
            return row.load(self.places_ref, *ats[nth], mask=exist[nth])

        # Of one chunk read where they are asked for: they take no registers until then. Of more,
        # they are on their way with the keys.
        places = [read(nth) for nth in range(len(keys))] if self.chunks > 1 else None
        return [
            (key, functools.partial(places.__getitem__ if places else read, nth))
            for nth, key in enumerate(keys)
        ]


class _Picked(NamedTuple):
    """Where a row's picks are written: places, rising, and the least key if it is asked for."""

    places_ref: Any
    least_ref: Any | None


def _pick_in_registers(
    contenders: _Contenders, budget: Any, out: _Picked, tile: int, threads: int
) -> None:
    """Pick the contenders of the `budget` largest keys, of no more than `tile` of them."""
    row = contenders.row
    run = min(max(tile // threads, 1), RUN)
    block = run * jnp.arange(threads)
    firsts = range(0, tile, run * threads)
    found = contenders.find([first + block + j for first in firsts for j in range(run)])
    blocks = [found[i : i + run] for i in range(0, len(found), run)]
    keys = [key for of_block in blocks for key, _ in of_block]
    end = last_key(keys, None, budget, interpret=row.interpret)
    wanted = budget - end.above
    marks = [[(key > end.key, key == end.key) for key, _ in of_block] for of_block in blocks]
    pairs = [
        [above.astype(jnp.int32) | (tied.astype(jnp.int32) << 16) for above, tied in of_block]
        for of_block in marks
    ]
    own = [functools.reduce(jnp.add, of_block) for of_block in pairs]
    # Of one chunk the places are read only now, all before the first one is used.
    places = [[place() for _, place in of_block] for of_block in blocks]
    if contenders.chunks == 1 and launch.takes_assembly(row.interpret):
        own[0] = warp.after(own[0], [place for of_block in places for place in of_block])
    before = jnp.zeros(threads, jnp.int32)
    scanned = scan_together(own, interpret=row.interpret)
    for i, (earlier, total) in enumerate(scanned):
        through = itertools.accumulate(pairs[i][:-1], jnp.add, initial=before + earlier)
        before += total
        for place, (above, tied), pair in zip(places[i], marks[i], through, strict=True):
            above_before, ties_before = halves(pair)
            picked = above | (tied & (ties_before < wanted))
            at = above_before + jnp.minimum(ties_before, wanted)
            row.store(out.places_ref, place, at, mask=picked)
    if out.least_ref is not None:
        here = jnp.full(threads, row.b), jnp.full(threads, row.h)
        plt.store(out.least_ref.at[here], end.key)


def _pick_in_memory(contenders: _Contenders, budget: Any, out: _Picked, tile: int) -> None:
    """Pick the same of any number: each round of a bisection reads them again, `tile` at a time."""
    row = contenders.row

    def each(visit: Any, state: Any) -> Any:
        def of_block(i: Any, state: Any) -> Any:
            return visit(*contenders.find([i * tile + jnp.arange(tile)])[0], state)

        blocks = lax.div(contenders.count + (tile - 1), jnp.int32(tile))
        return lax.fori_loop(0, blocks, of_block, state)

    def widen(key: Any, _: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = state
        least = jnp.min(jnp.where(key > 0, key, jnp.uint32(LARGEST)))
        return jnp.minimum(low, least), jnp.maximum(high, jnp.max(key))

    def held(bound: Any) -> Any:
        def add(key: Any, _: Any, held: Any) -> Any:
            return held + jnp.sum((key >= bound).astype(jnp.int32))

        return each(add, jnp.int32(0))

    low, high = each(widen, (jnp.uint32(LARGEST), jnp.uint32(0)))
    bound, above = threshold(held, budget, low, high + jnp.uint32(1))

    Written = tuple[tuple[Any, Any], Any]

    def write(key: Any, place: Callable[[], Any], state: Written) -> Written:
        before, least = state
        larger, ties = key > bound, key == bound
        picked, at, before = list_selected(larger, ties, budget - above, before)
        row.store(out.places_ref, place(), at, mask=picked)
        if out.least_ref is not None:
            key = jnp.where(picked, key, jnp.uint32(LARGEST))
            least = jnp.minimum(least, jnp.min(key))
        return before, least

    _, least = each(write, ((jnp.int32(0), jnp.int32(0)), jnp.uint32(LARGEST)))
    if out.least_ref is not None:
        row.store(out.least_ref, least)


def pick_rows(
    keys_before: Any,
    places_before: Any,
    counts_ref: Any,
    log_mass_ref: Any,
    starts_ref: Any,
    budget_ref: Any,
    picked_ref: Any,
    keys_ref: Any,
    places_ref: Any,
    least_ref: Any | None,
    prefix_ref: Any,
    *,
    tile: int,
    threads: int,
    interpret: bool,
) -> None:
    """List one row's best contenders: which candidates are retrieved.

    Args:
        keys_before, places_before: `keys_ref` and `places_ref`, which are written in place.
        counts_ref: from `list_contenders`.
        log_mass_ref: `[batch, kv_heads, candidates]` float32.
        starts_ref: `Candidates.starts`.
        budget_ref: `[batch, kv_heads]` int32.
        picked_ref: `[batch, kv_heads, max_tokens]` int32, out: the places, rising.
        keys_ref, places_ref: from `list_contenders`, in place.
        least_ref: `[batch, kv_heads]` uint32, out: the least key that is picked. None where nobody
            asks for it.
        prefix_ref: `[batch, kv_heads, chunks]` int32, scratch.
        tile: so many contenders are held in registers; if there are more, they are read again and
            again.
        threads: of the program.
        interpret: whether the kernel is interpreted.
    """
    del keys_before, places_before
    row = HeadView(
        pl.program_id(1), log_mass_ref.shape[1], None, interpret=interpret, block=min(tile, 2048)
    )
    rooms = log_mass_ref.shape[-1], picked_ref.shape[-1]
    total, budget = limits(row, starts_ref, budget_ref, rooms)
    nth = jnp.arange(launch.tile(counts_ref.shape[-1]))
    counts = row.load(counts_ref, nth, mask=nth < counts_ref.shape[-1])
    found = jnp.sum(counts)
    few = found < budget
    pl.when(few)(lambda: _take_all(row, (keys_ref, places_ref), log_mass_ref, total))
    chunk = keys_ref.shape[-1]
    counts = jnp.where(few, jnp.clip(total - nth * chunk, 0, chunk), counts)
    count = jnp.where(few, total, found)

    @pl.when(budget > 0)
    def pick() -> None:
        contenders = _Contenders(row, keys_ref, places_ref, prefix_ref, count)
        contenders.count_before(counts)
        out = _Picked(picked_ref, least_ref)
        pl.when(count <= tile)(lambda: _pick_in_registers(contenders, budget, out, tile, threads))
        pl.when(count > tile)(lambda: _pick_in_memory(contenders, budget, out, tile))


def limits(
    row: HeadView, starts_ref: Any, budget_ref: Any, rooms: tuple[int, int]
) -> tuple[Any, Any]:
    """Read a row's candidates, and how many of them are retrieved: int32 both.

    Args:
        row: whose.
        starts_ref: `Candidates.starts`.
        budget_ref: `[batch, kv_heads]` int32.
        rooms: for candidates, and for retrieved ones.
    """
    total = row.load(starts_ref, jnp.int32(starts_ref.shape[-1] - 1))
    total = jnp.minimum(total, rooms[0])
    return total, jnp.minimum(jnp.minimum(row.load(budget_ref), total), rooms[1])
