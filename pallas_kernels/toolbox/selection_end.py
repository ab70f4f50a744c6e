"""Where a row's selection ends, exactly: the last steps of what `_split` begins."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.bisection import ANY_PLACE, Each, cut
from pallas_kernels.toolbox.block_select import last_key
from pallas_kernels.toolbox.block_sums import sum_together
from pallas_kernels.toolbox.head_view import HeadView
from pallas_kernels.toolbox.sampled_split import Lists, Load, places_of_threads

# Contenders that `read_end` reads at once.
READ_TILE = 1024


class End(NamedTuple):
    """Where a row's selection ends: numbers, or `[threads]` of them, the same in all threads.

    Attributes:
        key, last: uint32 and int32: selected is what has a larger key, or this key and a place of
            at most `last`.
        count, before: int32, how many elements are selected, and of these how many lie before the
            program's chunk.
        weight, before_weight: int32, the same of their weights.
    """

    key: Any
    last: Any
    count: Any
    before: Any
    weight: Any
    before_weight: Any

    def selects(self, keys: Any, places: Any) -> Any:
        """Which elements are selected."""
        return _selects(self.key, self.last, keys, places)


def _selects(key: Any, last: Any, keys: Any, places: Any) -> Any:
    return (keys > key) | ((keys == key) & (places <= last))


def find_end(
    row: HeadView, lists: Lists, load: Load, total: Any, budget: Any, tile: int, threads: int
) -> None:
    """Find the end of a row's selection; one program a row.

    Args:
        row: whose elements.
        lists: from `split`; the end is written.
        load: reads elements.
        total: int32, the row's elements.
        budget: int32, at least 1: what the selected elements should weigh, and at most what all
            weigh together.
        tile: so many contenders are held in registers. Where there are more, each round of the
            search reads them again.
        threads: of the program.
    """
    chunks = lists.held.shape[-1]
    nth = jnp.arange(launch.tile(chunks))
    held = jnp.sum(row.load(lists.held, nth, mask=nth < chunks))
    listed = row.load(lists.number)

    def finish(end: tuple[Any, Any], right: int) -> None:
        key, last = end
        key = lax.bitcast_convert_type(key, jnp.int32)
        for i, x in enumerate((key, last, jnp.int32(right))):
            row.store(lists.end, x, jnp.int32(i))

    def is_right(contended: Any) -> Any:
        return (held < budget) & (budget <= held + contended)

    def among_contenders(tile: int) -> Any:
        places = places_of_threads(tile, threads)
        elements = list(map(_contenders(row, lists, listed), places))
        right = is_right(
            jnp.sum(functools.reduce(jnp.add, (weights for _, weights, _ in elements)))
        )

        @pl.when(right)
        def find() -> None:
            key, last = _cut_in_registers(row, elements, budget - held)
            finish((jnp.max(key), jnp.max(last)), 1)

        return right

    def among_many() -> Any:
        each = _by_blocks(_contenders(row, lists, listed), listed, tile)
        right = is_right(
            each(lambda keys, weights, places, sum_: sum_ + jnp.sum(weights), jnp.int32(0))
        )
        pl.when(right)(lambda: finish(cut(each, budget - held), 1))
        return right

    # Half of the tile takes half as long.
    right = lax.cond(
        listed <= tile // 2,
        lambda: among_contenders(tile // 2),
        lambda: lax.cond(listed <= tile, lambda: among_contenders(tile), among_many),
    )

    @pl.when(~right)
    def among_all() -> None:
        finish(cut(_by_blocks(_everything(load, total), total, tile), budget), 0)


def read_end(
    row: HeadView, part: Any, lists: Lists, load: Load, total: Any, chunk: int, threads: int
) -> End:
    """Read the end that `find_end` found, with what is selected before this program's chunk.

    Args:
        row: whose.
        part: which chunk is the program's.
        lists: from `split` and `find_end`.
        load, total, threads: as for `find_end`.
        chunk: elements that are a program's, as for `split`.
    """
    chunks, start = lists.sure.shape[-1], part * chunk
    key, last, right = (row.load(lists.end, jnp.int32(i)) for i in range(3))
    key, right, listed = (
        lax.bitcast_convert_type(key, jnp.uint32),
        right > 0,
        row.load(lists.number),
    )
    none = (jnp.zeros(threads, jnp.int32),) * 4

    def among(elements: Callable[..., Any], count: Any) -> Any:
        def of_block(i: Any, sums: Any) -> Any:
            places = places_of_threads(READ_TILE, threads)
            every = [elements(i * READ_TILE + place) for place in places]
            return tuple(_count_selected(sums, key, last, every, start))

        return lax.fori_loop(
            0, lax.div(count + (READ_TILE - 1), jnp.int32(READ_TILE)), of_block, none
        )

    def among_contenders() -> Any:
        sums = among(_contenders(row, lists, listed), listed)
        for nth in places_of_threads(launch.tile(chunks), threads):
            sure, held = (row.load(ref, nth, mask=nth < chunks) for ref in (lists.sure, lists.held))
            own = sure, jnp.where(nth < part, sure, 0), held, jnp.where(nth < part, held, 0)
            sums = tuple(map(jnp.add, sums, own))
        return sums

    sums = lax.cond(right, among_contenders, lambda: among(_everything(load, total), total))
    return End(key, last, *sum_together(sums, interpret=row.interpret))


def _count_selected(sums: Any, key: Any, last: Any, elements: list[Any], start: Any) -> list[Any]:
    """Each thread's share of `End`'s sums, with these elements added."""
    for keys, weights, places in elements:
        weights = jnp.where(_selects(key, last, keys, places), weights, 0)
        number, earlier = (weights > 0).astype(jnp.int32), places < start
        own = number, jnp.where(earlier, number, 0), weights, jnp.where(earlier, weights, 0)
        sums = list(map(jnp.add, sums, own))
    return list(sums)


def _contenders(row: HeadView, lists: Lists, listed: Any) -> Callable[..., Any]:
    def contenders(i: Any) -> tuple[Any, Any, Any]:
        fields = lists.keys, lists.weights, lists.places
        keys, weights, places = (row.load(ref, i, mask=i < listed) for ref in fields)
        return keys, weights, places

    return contenders


def _everything(load: Load, total: Any) -> Callable[..., Any]:
    def everything(i: Any) -> tuple[Any, Any, Any]:
        return *load(i, i < total), i

    return everything


def _by_blocks(elements: Callable[..., Any], count: Any, tile: int) -> Each:
    """Visits elements so many at once: those of which `elements(i)` gives what `Each` hands on."""

    def each(visit: Any, state: Any) -> Any:
        def of_block(i: Any, state: Any) -> Any:
            return visit(*elements(i * tile + jnp.arange(tile)), state)

        return lax.fori_loop(0, lax.div(count + (tile - 1), jnp.int32(tile)), of_block, state)

    return each


def end_of_all(row: HeadView, part: Any, elements: list[Any], budget: Any, chunk: int) -> End:
    """Find the end of a row's selection, found in registers and by every program for itself.

    Args:
        row: whose elements.
        part: which chunk is the program's.
        elements: all of the row's: keys, weights and places, `[threads]` each.
        budget: int32, as for `find_end`.
        chunk: elements that are a program's.
    """
    key, last = _cut_in_registers(row, elements, budget)
    none = [jnp.zeros_like(elements[0][-1])] * 4
    sums = _count_selected(none, key, last, elements, part * chunk)
    return End(key, last, *sum_together(sums, interpret=row.interpret))


def _cut_in_registers(row: HeadView, elements: list[Any], budget: Any) -> tuple[Any, Any]:
    """`cut` of elements of which each thread has some: `[threads]`, the same in all threads.

    Args:
        row: whose.
        elements: keys, weights and places, `[threads]` each.
        budget: int32, at least 1.
    """
    keys, weights, places = zip(*elements, strict=True)
    end = last_key(keys, weights, budget, interpret=row.interpret)

    def among_ties() -> Any:
        # Of what has the key, the lower places first.
        tied = [
            jnp.where(key == end.key, ~place.astype(jnp.uint32), 0)
            for key, place in zip(keys, places, strict=True)
        ]
        last = last_key(tied, weights, budget - end.above, interpret=row.interpret)
        return (~last.key).astype(jnp.int32)

    # Not the bare number: Triton's branches do not yield constants.
    every = jnp.maximum(end.ties, ANY_PLACE)
    return end.key, lax.cond(jnp.max(end.ties) > 1, among_ties, lambda: every)
