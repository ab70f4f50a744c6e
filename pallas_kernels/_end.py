"""Where a row's selection ends, exactly: the last steps of what `_split` begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels._bisect import ANY_PLACE, Each, cut
from pallas_kernels._pairs import sum_pair
from pallas_kernels._row import Row
from pallas_kernels._search import last_key
from pallas_kernels._split import Lists, Load, places_of_threads

# Contenders that `read_end` reads at once.
READ_TILE = 1024


class End(NamedTuple):
    """Where a row's selection ends.

    Attributes:
        key, last: uint32 and int32: selected is what has a larger key, or this key and a place of
            at most `last`.
        count, weight: int32, how many elements are selected, and their weights' sum.
        before, before_weight: int32, the same of the elements before the program's chunk.
    """

    key: Any
    last: Any
    count: Any
    weight: Any
    before: Any
    before_weight: Any

    def selects(self, keys: Any, places: Any) -> Any:
        """Which elements are selected."""
        return _selects(self.key, self.last, keys, places)


def _selects(key: Any, last: Any, keys: Any, places: Any) -> Any:
    return (keys > key) | ((keys == key) & (places <= last))


def find_end(
    row: Row, lists: Lists, load: Load, total: Any, budget: Any, tile: int, threads: int
) -> None:
    """Finds the end of a row's selection; one program a row.

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
    nth = jnp.arange(_pallas.tile(chunks))
    held = jnp.sum(row.load(lists.held, nth, mask=nth < chunks))
    listed = row.load(lists.number)

    def finish(end: tuple[Any, Any], right: int) -> None:
        key, last = end
        key = lax.bitcast_convert_type(key, jnp.int32)
        for i, x in enumerate((key, last, jnp.int32(right))):
            row.store(lists.end, x, jnp.int32(i))

    right = (held < budget) & (budget <= held + row.load(lists.contended))

    def among_contenders(tile: int) -> None:
        elements = map(_contenders(row, lists, listed), places_of_threads(tile, threads))
        finish(_cut_in_registers(row, list(elements), budget - held), 1)

    # Each round of the search takes half as long in half of the tile.
    few = listed <= tile // 2
    pl.when(right & few)(lambda: among_contenders(tile // 2))
    pl.when(right & ~few & (listed <= tile))(lambda: among_contenders(tile))

    @pl.when(right & (listed > tile))
    def among_many() -> None:
        each = _by_blocks(_contenders(row, lists, listed), listed, tile)
        finish(cut(each, budget - held), 1)

    @pl.when(~right)
    def among_all() -> None:
        finish(cut(_by_blocks(_everything(load, total), total, tile), budget), 0)


def read_end(row: Row, part: Any, lists: Lists, load: Load, total: Any, chunk: int) -> End:
    """The end that `find_end` found, with what is selected before this program's chunk.

    Args:
        row: whose.
        part: which chunk is the program's.
        lists: from `split` and `find_end`.
        load, total: as for `find_end`.
        chunk: elements that are a program's, as for `split`.
    """
    chunks, start = lists.sure.shape[-1], part * chunk
    nth = jnp.arange(_pallas.tile(chunks))
    key, last, right = (row.load(lists.end, jnp.int32(i)) for i in range(3))
    key, right, listed = (
        lax.bitcast_convert_type(key, jnp.uint32),
        right > 0,
        row.load(lists.number),
    )

    def add(keys: Any, weights: Any, places: Any, state: Any) -> Any:
        weights = jnp.where(_selects(key, last, keys, places), weights, 0)
        pair = weights, jnp.where(places < start, weights, 0)
        numbers = [(x > 0).astype(jnp.int32) for x in pair]
        return tuple(x + y for x, y in zip(state, (*pair, *numbers), strict=True))

    def together(each: Each) -> Any:
        # One sum over the threads for all blocks.
        zeros = jnp.zeros(READ_TILE, jnp.int32)
        return tuple(jnp.sum(x) for x in each(add, (zeros,) * 4))

    def among_contenders() -> Any:
        def of_sure(ref: Any) -> list[Any]:
            sure = row.load(ref, nth, mask=nth < chunks)
            return [jnp.sum(sure), jnp.sum(jnp.where(nth < part, sure, 0))]

        sure = of_sure(lists.held) + of_sure(lists.sure)
        found = together(_by_blocks(_contenders(row, lists, listed), listed, READ_TILE))
        return tuple(x + y for x, y in zip(sure, found, strict=True))

    def among_all() -> Any:
        return together(_by_blocks(_everything(load, total), total, READ_TILE))

    sums = lax.cond(right, among_contenders, among_all)
    weight, before_weight, count, before = sums
    return End(key, last, count, weight, before, before_weight)


def _contenders(row: Row, lists: Lists, listed: Any) -> Callable[..., Any]:
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


def end_of_all(row: Row, part: Any, elements: list[Any], budget: Any, chunk: int) -> End:
    """The end of a row's selection, found in registers and by every program for itself.

    Args:
        row: whose elements.
        part: which chunk is the program's.
        elements: all of the row's: keys, weights and places, `[threads]` each.
        budget: int32, as for `find_end`.
        chunk: elements that are a program's.
    """
    key, last = _cut_in_registers(row, elements, budget)
    zero = jnp.zeros_like(elements[0][-1])
    sums = [zero] * 4
    for keys, weights, place in elements:
        weights = jnp.where(_selects(key, last, keys, place), weights, 0)
        number, earlier = (weights > 0).astype(jnp.int32), place < part * chunk
        own = number, jnp.where(earlier, number, 0), weights, jnp.where(earlier, weights, 0)
        sums = [x + y for x, y in zip(sums, own, strict=True)]
    count, before = sum_pair(*sums[:2])
    return End(
        *(key, last, count),
        weight=jnp.sum(sums[2]),
        before=before,
        before_weight=jnp.sum(sums[3]),
    )


def _cut_in_registers(row: Row, elements: list[Any], budget: Any) -> tuple[Any, Any]:
    """`cut` of elements of which each thread has some.

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
        return jnp.max((~last.key).astype(jnp.int32))

    ties = jnp.max(end.ties)
    # Not the bare number: Triton's branches do not yield constants.
    every = jnp.maximum(ties, jnp.int32(ANY_PLACE))
    return jnp.max(end.key), lax.cond(ties > 1, among_ties, lambda: every)
