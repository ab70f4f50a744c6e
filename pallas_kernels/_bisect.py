"""Exact selection inside a kernel: a threshold by bisection on ordered bits."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

# Stands for "everything at the threshold is to be marked", as what lies above it.
ALL = -(2**30)

# Once the range is this small, few keys are left in it: they are tried one by one, largest first.
SNAP_RANGE = 2**12


def threshold(
    held: Callable[[Any], Any],
    budget: Any,
    low: Any,
    high: Any,
    *,
    largest_below: Callable[[Any], Any] | None = None,
    resolution: int = 1,
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
        largest_below: from a uint32 key to the largest one below it that an element has. For
            weights that seldom add up to the budget exactly, it saves the last rounds.
        resolution: how far below the threshold the result may lie.

    Returns:
        key: uint32; `low` where everything together does not reach the budget.
        above: int32, the weights held by larger keys, or `ALL` where the budget is held exactly
            at the key. Of no meaning at a resolution other than 1.
    """
    State = tuple[Any, Any, Any]

    def halve(state: State) -> State:
        low, high, above = state
        middle = low + lax.shift_right_logical(high - low, jnp.uint32(1))
        now = held(middle)
        exact = now == budget
        low = jnp.where(now >= budget, middle, low)
        high = jnp.where((now < budget) | exact, middle, high)
        return low, high, jnp.where(exact, ALL, jnp.where(now < budget, now, above))

    def snap(state: State) -> State:
        low, high, above = state
        key = jnp.maximum(largest_below(high), low)  # type: ignore[misc]
        now = held(key)
        reached = now >= budget
        state = jnp.where(reached, key, low), key, jnp.where(reached, above, now)
        # Halving as well bounds the rounds, however many keys there are in the range.
        return lax.cond(reached, lambda s: s, halve, state)

    coarse = resolution if largest_below is None else SNAP_RANGE
    state = lax.while_loop(
        lambda s: s[1] - s[0] > jnp.uint32(coarse), halve, (low, high, jnp.int32(0))
    )
    if largest_below is not None:
        state = lax.while_loop(lambda s: s[1] - s[0] > jnp.uint32(resolution), snap, state)
    return state[0], state[2]
