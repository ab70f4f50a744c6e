"""Where a selection ends, by counting keys in bins: a program's threads together, in few passes.

A bisection on ordered bits takes a round for each bit of the answer, and each round waits for a sum
over all threads. Bins settle nine of them at once: each thread adds its elements to bins in the
processor's shared memory, and one warp finds the bin in which the selection ends.
Neither is in Pallas' Triton backend (jax 0.11), so it is a piece of CUDA's assembly.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.toolbox import launch, ptx_histogram, warp
from pallas_kernels.toolbox.bisection import threshold


class Last(NamedTuple):
    """Where a selection ends; of each number `[threads]`, the same in all threads.

    Attributes:
        key: uint32, the largest key whose holders, with all of a larger key, weigh the budget or
            more; the least key of all where everything together weighs less.
        above: int32, what the larger keys weigh.
        ties: int32, how many elements have the key.
    """

    key: Any
    above: Any
    ties: Any


def last_key(
    keys: Sequence[Any],
    weights: Sequence[Any] | None,
    budget: Any,
    *,
    fine: int = 0,
    interpret: bool,
) -> Last:
    """Where the selection of the largest keys ends that together weigh the budget or more.

    Every thread of the program must call it, with one element of each vector.

    Args:
        keys: `[threads]` uint32 each; zero for what does not exist.
        weights: `[threads]` int32 each, none negative; None for one each.
        budget: int32, at least 1; a number or `[threads]` of it.
        fine: the key may lie below what it should be by less than 2^fine; above and ties have no
            meaning if it is not zero.
        interpret: whether the kernel is interpreted.
    """
    threads = keys[0].shape[0]
    budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (threads,))
    if not launch.takes_assembly(interpret):
        return _by_bisection(keys, weights, budget)
    operands = [*keys, budget, *(weights or ())]
    text = ptx_histogram.search(len(keys), weights is not None, threads, fine)
    found = launch.assembly(text, *operands, dtype=jnp.int32)
    # Pallas' assembly has one result, so each quarter of a warp has another number.
    key, above, ties = (
        warp.from_lane(found, jnp.full(threads, warp.LANES // 4 * i, jnp.int32)) for i in range(3)
    )
    return Last(lax.bitcast_convert_type(key, jnp.uint32), above, ties)


def _by_bisection(keys: Sequence[Any], weights: Sequence[Any] | None, budget: Any) -> Last:
    """Find the same in plain JAX, to any fineness."""
    most, budget = jnp.uint32(2**32 - 1), jnp.max(budget)
    weights = weights or [jnp.ones(key.shape, jnp.int32) for key in keys]

    def together(combine: Any, values: Any) -> Any:
        return functools.reduce(combine, values)

    def held(bound: Any) -> Any:
        of_key = (
            jnp.where((key >= bound) & (key > 0), weight, 0)
            for key, weight in zip(keys, weights, strict=True)
        )
        return jnp.sum(together(jnp.add, of_key))

    def least_from(bound: Any) -> Any:
        of_key = (jnp.where((key >= bound) & (key > 0), key, most) for key in keys)
        return jnp.min(together(jnp.minimum, of_key))

    high = jnp.max(together(jnp.maximum, keys))
    low = jnp.minimum(least_from(jnp.uint32(0)), high)
    key, _ = threshold(held, budget, low, high + jnp.uint32(1))
    # Where the budget is held exactly, the search ends before the key is one that is there.
    key = jnp.minimum(least_from(key), high)
    ties = jnp.sum(together(jnp.add, ((x == key).astype(jnp.int32) for x in keys)))
    shape = keys[0].shape
    return Last(*(jnp.broadcast_to(x, shape) for x in (key, held(key + jnp.uint32(1)), ties)))
