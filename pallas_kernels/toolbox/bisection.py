"""Exact selection inside a kernel: a threshold by bisection on ordered bits."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

# Stands for "everything at the threshold is to be marked", as what lies above it.
ALL = -(2**30)

# `cut`'s last place where everything at the key is marked: no place is larger.
ANY_PLACE = 2**31 - 1

# Once the range is this small, few keys are left in it: they are tried one by one, largest first.
SNAP_RANGE = 2**12


def threshold(
    held: Callable[[Any], Any],
    budget: Any,
    low: Any,
    high: Any,
    *,
    largest_below: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Find the largest key whose holders, with all of a larger key, reach the budget.

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

    Returns:
        key: uint32; `low` where everything together does not reach the budget.
        above: int32, the weights held by larger keys, or `ALL` where the budget is held exactly
            at the key.
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

    coarse = 1 if largest_below is None else SNAP_RANGE
    state = lax.while_loop(
        lambda s: s[1] - s[0] > jnp.uint32(coarse), halve, (low, high, jnp.int32(0))
    )
    if largest_below is not None:
        state = lax.while_loop(lambda s: s[1] - s[0] > jnp.uint32(1), snap, state)
    return state[0], state[2]


# each(visit, state) -> state: calls visit(key, weight, place, state) for blocks of a row's
# elements, uint32, int32 and int32 vectors; what does not exist has no weight.
Each = Callable[[Callable[..., Any], Any], Any]


def cut(each: Each, budget: Any) -> tuple[Any, Any]:
    """Where a row's selection ends: the elements of largest key that together reach the budget.

    Args:
        each: over the row's elements; a weight of zero leaves an element out.
        budget: int32, at least 1.

    Returns:
        key, last: uint32 and int32. Selected is what has a larger key, or this key and a place of
            at most `last`; everything if all of it does not reach the budget.
    """
    zero, most = jnp.int32(0), jnp.uint32(2**32 - 1)

    def range_of(value: Callable[..., Any]) -> tuple[Any, Any]:
        def widen(key: Any, weight: Any, place: Any, state: Any) -> Any:
            counts, x = value(weight > 0, key, place)
            least = jnp.min(jnp.where(counts, x, most))
            largest = jnp.max(jnp.where(counts, x, jnp.uint32(0)))
            return jnp.minimum(state[0], least), jnp.maximum(state[1], largest)

        low, high = each(widen, (most, jnp.uint32(0)))
        return jnp.minimum(low, high), high + jnp.uint32(1)

    def holders(value: Callable[..., Any]) -> Callable[[Any], Any]:
        def held(bound: Any) -> Any:
            def add(key: Any, weight: Any, place: Any, total: Any) -> Any:
                counts, x = value(True, key, place)
                return total + jnp.sum(jnp.where(counts & (x >= bound), weight, 0))

            return each(add, zero)

        return held

    def by_key(counts: Any, key: Any, place: Any) -> tuple[Any, Any]:
        return counts, key

    def largest_below(bound: Any) -> Any:
        def widen(key: Any, weight: Any, place: Any, largest: Any) -> Any:
            below = (weight > 0) & (key < bound)
            return jnp.maximum(largest, jnp.max(jnp.where(below, key, jnp.uint32(0))))

        return each(widen, jnp.uint32(0))

    low, high = range_of(by_key)
    # Weights seldom add up to the budget exactly, which would end the search early.
    key, above = threshold(holders(by_key), budget, low, high, largest_below=largest_below)

    def by_place(counts: Any, keys: Any, place: Any) -> tuple[Any, Any]:
        # Of what has the key, the lower places first.
        return counts & (keys == key), ~place.astype(jnp.uint32)

    def among_ties() -> Any:
        low, high = range_of(by_place)
        bound, _ = threshold(holders(by_place), budget - above, low, high)
        return (~bound).astype(jnp.int32)

    # Not the bare number: Triton's branches do not yield constants.
    every = jnp.where(above == ALL, jnp.int32(ANY_PLACE), above)
    return key, lax.cond(above == ALL, lambda: every, among_ties)
