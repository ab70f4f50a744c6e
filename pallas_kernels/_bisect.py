"""Exact selection inside a kernel: a threshold by bisection on ordered bits."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

# Stands for "everything at the threshold is to be marked", as what lies above it.
ALL = -(2**30)


def threshold(
    held: Callable[[Any], Any], budget: Any, low: Any, high: Any, resolution: int = 1
) -> tuple[Any, Any]:
    """The largest key whose holders, with all of a larger key, reach the budget.

    The in-kernel counterpart of `_numerics.heaviest`. It ends as soon as a key is found at which
    the budget is held exactly: for distinct keys of equal weight that is after some 14 rounds.

    Args:
        held: from a uint32 key to the int32 sum of the weights of the elements of that key or a
            larger one.
        budget: int32, at least 1.
        low: uint32, the least key of all.
        high: uint32, more than the largest.
        resolution: how far below the threshold the result may lie.

    Returns:
        key: uint32; `low` where everything together does not reach the budget.
        above: int32, the weights held by larger keys, or `ALL` where the budget is held exactly
            at the key. Of no meaning at a resolution other than 1.
    """

    def unfinished(state: tuple[Any, Any, Any]) -> Any:
        low, high, _ = state
        return high - low > jnp.uint32(resolution)

    def halve(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        low, high, above = state
        middle = low + lax.shift_right_logical(high - low, jnp.uint32(1))
        now = held(middle)
        exact = now == budget
        low = jnp.where(now >= budget, middle, low)
        high = jnp.where((now < budget) | exact, middle, high)
        return low, high, jnp.where(exact, ALL, jnp.where(now < budget, now, above))

    key, _, above = lax.while_loop(unfinished, halve, (low, high, jnp.int32(0)))
    return key, above
