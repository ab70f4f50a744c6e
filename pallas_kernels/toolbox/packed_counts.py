"""Two small numbers in one int32: one sum over a program's threads gives both sums."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def halves(pair: Any) -> tuple[Any, Any]:
    """Return the lower and the upper 16 bits of int32, as numbers that are not negative."""
    return pair & 0xFFFF, lax.shift_right_logical(pair, jnp.full_like(pair, 16))


def list_selected(
    above: Any, ties: Any, wanted_ties: Any, so_far: tuple[Any, Any]
) -> tuple[Any, Any, tuple[Any, Any]]:
    """Which elements a selection takes, and their places in the list of what it takes.

    Args:
        above, ties: `[n]` bool, at most 2^15 - 1: the elements beyond the selection's threshold,
            and those at it.
        wanted_ties: int32, how many of the ties are taken, the first ones.
        so_far: int32 both, how many elements before these are above, and ties.

    Returns:
        `[n]` bool and `[n]` int32, meaningful where taken; and `so_far` with these elements.
    """
    above_n, ties_n = above.astype(jnp.int32), ties.astype(jnp.int32)
    pair = above_n | (ties_n << 16)
    above_before, ties_before = halves(jnp.cumsum(pair) - pair)
    above_before, ties_before = so_far[0] + above_before, so_far[1] + ties_before
    taken = above | (ties & (ties_before < wanted_ties))
    places = above_before + jnp.minimum(ties_before, wanted_ties)
    these = halves(jnp.sum(pair))
    return taken, places, (so_far[0] + these[0], so_far[1] + these[1])
