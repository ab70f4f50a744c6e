"""Selection by many programs a row: first by a sample, then exactly among what it leaves open.

Four steps, each a kernel or a part of one, so that no program looks at a whole row in detail:
`find_bracket` draws a sample and finds two masses between which the selection ends; `split` counts
what lies above, chunk by chunk, and lists what lies between, the *contenders*, row by row; in
`_end`, `find_end` finds the exact end among these and `read_end` counts what is selected before a
chunk. If the sample misled, which `find_end` sees, all elements contend.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels._bisect import bracket
from pallas_kernels._row import Row
from pallas_kernels._rows import Rows

# How many standard deviations of what the sample holds the bracket is wide, each way, and how many
# of the heaviest elements more: one row in some ten thousand is misjudged, or fewer.
DEVIATIONS, SPARE = 4.0, 8.0

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
    row: Row,
    bracket_ref: Any,
    number_ref: Any,
    load: Load,
    total: Any,
    budget: Any,
    sample: int,
) -> None:
    """Writes a row's bracket and resets the number of its contenders; one program a row.

    Args:
        row: whose elements.
        bracket_ref: `[batch, kv_heads, 2]` uint32, out; see `_bisect.bracket`.
        number_ref: `Lists.number`, out.
        load: reads elements.
        total: int32, the row's elements.
        budget: int32, what the selected elements should weigh.
        sample: how many elements, spread over the row, set it.
    """
    row.store(number_ref, jnp.int32(0))
    stride = lax.div(total + (sample - 1), jnp.int32(sample))
    # The middle of each stride.
    at = stride * jnp.arange(sample) + (stride >> 1)
    keys, weights = load(at, at < total)
    weights = jnp.where(at < total, weights, 0)
    counts = weights > 0

    def held(key1: Any, key2: Any) -> tuple[Any, Any]:
        first, second = (jnp.where(keys >= key, weights, 0) for key in (key1, key2))
        return jnp.sum(first), jnp.sum(second)

    low = jnp.min(jnp.where(counts, keys, jnp.uint32(2**32 - 1)))
    high = jnp.max(jnp.where(counts, keys, jnp.uint32(0)))
    heaviest = jnp.max(weights).astype(jnp.float32)
    rank = budget.astype(jnp.float32) / jnp.maximum(stride, 1).astype(jnp.float32)
    # The variance of a sum of so many weights is the sum of their squares, as a rule.
    each = weights.astype(jnp.float32)
    squares = rank * jnp.sum(each * each) / jnp.maximum(jnp.sum(each), 1.0)
    margin = DEVIATIONS * jnp.sqrt(squares) + SPARE * heaviest
    low = jnp.minimum(low, high)
    found = bracket(held, rank - margin, rank + margin, low, high + jnp.uint32(1))
    for i, key in enumerate(found):
        row.store(bracket_ref, key, jnp.int32(i))


def split(
    row: Row, part: Any, lists: Lists, bracket_ref: Any, load: Load, total: Any, chunk: int
) -> None:
    """Splits this program's chunk of a row's elements.

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


def list_shapes(rows: Rows, elements: int, chunks: int) -> Lists:
    """The arrays of `Lists`, as `jax.ShapeDtypeStruct`."""
    return Lists(
        keys=rows.of(elements, dtype=jnp.uint32),
        places=rows.of(elements),
        weights=rows.of(elements),
        number=rows.of(),
        sure=rows.of(chunks),
        held=rows.of(chunks),
        end=rows.of(4),
    )
