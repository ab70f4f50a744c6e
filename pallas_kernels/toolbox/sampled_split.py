"""Selection by many programs a row: first by a sample, then exactly among what it leaves open.

Four steps, each a kernel or a part of one, so that no program looks at a whole row in detail:
`find_bracket` draws a sample and finds two masses between which the selection ends; `split` counts
what lies above, chunk by chunk, and lists what lies between, the *contenders*, row by row; in
`_end`, `find_end` finds the exact end among these and `read_end` counts what is selected before a
chunk. If the sample misled, which `find_end` sees, all elements contend.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.toolbox.block_select import last_key
from pallas_kernels.toolbox.head_calls import HeadCalls
from pallas_kernels.toolbox.head_view import HeadView

# How many standard deviations of what the sample holds the bracket is wide, each way, and how many
# of the heaviest elements more: one row in some ten thousand is misjudged, or fewer.
DEVIATIONS, SPARE = 4.0, 8.0

# How fine the bracket's bounds are set, in bits of the keys: 2^-6 of a mass's logarithm near 10.
FINE = 14

# load(i, exists) -> (keys, weights): of the row's elements i, uint32 and int32; what does not exist
# has no weight.
Load = Callable[[Any, Any], tuple[Any, Any]]


class Lists(NamedTuple):
    """What the steps hand on; all but the keys int32.

    Attributes:
        keys, places, weights: `[batch, kv_heads, elements]`, each row's contenders, in any order.
        number: `[batch, kv_heads]`, how many there are.
        sure, held: `[batch, kv_heads, chunks]`, how many elements of each chunk are surely
            selected, and their weights' sum.
        end: `[batch, kv_heads, 4]`, the key and the last place of the selection's end (see `End`),
            and whether the bracket was right.
    """

    keys: Any
    places: Any
    weights: Any
    number: Any
    sure: Any
    held: Any
    end: Any


def find_bracket(
    row: HeadView,
    bracket_ref: Any,
    number_ref: Any,
    load: Callable[[Any], tuple[Any, Any]],
    total: int,
    budget: Any,
    sample: int,
    threads: int,
) -> None:
    """Write a row's bracket and resets the number of its contenders; one program a row.

    Args:
        row: whose elements.
        bracket_ref: `[batch, kv_heads, 2]` uint32, out: what has a key under the first one is
            surely not selected, what has the second one or a larger one is.
        number_ref: `Lists.number`, out.
        load: reads elements of the sample: keys and weights, as `Load`.
        total: the row's elements.
        budget: int32, what the selected elements should weigh.
        sample: how many elements set it, each `sample_stride`-th of the row.
        threads: of the program.
    """
    row.store(number_ref, jnp.int32(0))
    keys, weights = zip(*(load(i) for i in places_of_threads(sample, threads)), strict=True)
    heaviest = jnp.max(functools.reduce(jnp.maximum, weights)).astype(jnp.float32)
    rank = budget.astype(jnp.float32) / sample_stride(total, sample)
    # The variance of a sum of so many weights is the sum of their squares, as a rule.
    each = [weight.astype(jnp.float32) for weight in weights]
    held = jnp.sum(functools.reduce(jnp.add, each))
    squares = rank * jnp.sum(functools.reduce(jnp.add, (x * x for x in each)))
    margin = DEVIATIONS * jnp.sqrt(squares / jnp.maximum(held, 1.0)) + SPARE * heaviest
    least, most = rank - margin, rank + margin

    def find(weight: Any) -> Any:
        weight = jnp.maximum(jnp.ceil(weight).astype(jnp.int32), 1)
        return last_key(keys, weights, weight, fine=FINE, interpret=row.interpret).key

    # The largest key that still holds `most`, and one that holds less than `least`; where the
    # sample tells nothing, the bounds of all keys.
    lower = jnp.where(held >= most, find(most), jnp.uint32(0))
    upper = jnp.where(least > 0, find(least) + jnp.uint32(2**FINE), jnp.uint32(2**32 - 1))
    for i, key in enumerate((lower, upper)):
        row.store(bracket_ref, key, jnp.full(threads, i))


def sample_stride(total: int, sample: int) -> int:
    """How far apart the elements of a sample are; it has the middle one of each stride."""
    return max(1, -(-total // sample))


def places_of_threads(tile: int, threads: int) -> list[Any]:
    """Which elements each thread has, one of each vector, of so many: `[threads]` int32 each."""
    return [first + jnp.arange(threads) for first in range(0, tile, threads)]


def split(
    row: HeadView, part: Any, lists: Lists, bracket_ref: Any, load: Load, total: Any, chunk: int
) -> None:
    """Split this program's chunk of a row's elements.

    Args:
        row: whose elements.
        part: which chunk.
        lists: what is written: the contenders, and the chunk's counts.
        bracket_ref: from `find_bracket`.
        load: reads elements.
        total: int32, the row's elements.
        chunk: how many are a program's.
    """
    lower, upper = (row.load(bracket_ref, jnp.int32(i)) for i in range(2))
    place = part * chunk + jnp.arange(chunk)
    keys, weights = load(place, place < total)
    exists = (place < total) & (weights > 0)
    sure = exists & (keys >= jnp.maximum(lower, upper))
    contends = exists & (keys >= lower) & (keys < upper)
    number = contends.astype(jnp.int32)
    # In which order the programs come is left to chance, and makes no difference.
    at = jnp.cumsum(number) - number + row.add(lists.number, jnp.sum(number))
    row.store(lists.keys, keys, at, mask=contends)
    row.store(lists.places, place, at, mask=contends)
    row.store(lists.weights, weights, at, mask=contends)
    row.store(lists.sure, jnp.sum(sure.astype(jnp.int32)), part)
    row.store(lists.held, jnp.sum(jnp.where(sure, weights, 0)), part)


def list_shapes(rows: HeadCalls, elements: int, chunks: int) -> Lists:
    """Return the arrays of `Lists`, as `jax.ShapeDtypeStruct`."""
    return Lists(
        keys=rows.of(elements, dtype=jnp.uint32),
        places=rows.of(elements),
        weights=rows.of(elements),
        number=rows.of(),
        sure=rows.of(chunks),
        held=rows.of(chunks),
        end=rows.of(4),
    )
