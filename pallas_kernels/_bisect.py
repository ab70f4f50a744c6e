"""Exact selection inside a kernel: a threshold by bisection on ordered bits."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

# Stands for "everything at the threshold is to be marked", as what lies above it.
ALL = -(2**30)


def threshold(
    held: Callable[[Any], Any], budget: Any, highest_bit: Any = 31, lowest_bit: int = 0
) -> tuple[Any, Any]:
    """The largest key whose holders, with all of a larger key, reach the budget.

    The in-kernel counterpart of `_numerics.heaviest`. It ends as soon as a key is found at which
    the budget is held exactly: for distinct keys that is after about half of the rounds.

    Args:
        held: from a uint32 key to the int32 sum of the weights of the elements of that key or a
            larger one.
        budget: int32, at least 1.
        highest_bit: of the largest key; a Python or int32 number.
        lowest_bit: where to stop: bits below it are left at zero.

    Returns:
        key: uint32.
        above: int32, the weights held by larger keys, or `ALL` where the budget is held exactly
            at the key.
    """

    def unfinished(state: tuple[Any, Any, Any]) -> Any:
        bit, _, _ = state
        return bit >= lowest_bit

    def halve(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        bit, key, above = state
        higher = key | lax.shift_left(jnp.uint32(1), bit.astype(jnp.uint32))
        now = held(higher)
        reached = now >= budget
        key = jnp.where(reached, higher, key)
        exact = now == budget
        above = jnp.where(exact, ALL, jnp.where(reached, above, now))
        return jnp.where(exact, lowest_bit - 1, bit - 1), key, above

    start = (jnp.int32(highest_bit), jnp.uint32(0), jnp.int32(0))
    _, key, above = lax.while_loop(unfinished, halve, start)
    return key, above
