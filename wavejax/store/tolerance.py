"""What a tolerance asks of each sequence, and how many of its heads were within it."""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from wavejax._pytree import state

Shares = tuple[float, float, float, float]
"""Of all heads those within the tolerance at once, after more tokens, when computed, never."""


class Met(NamedTuple):
    """How query heads met their tolerance, over layers and steps.

    Attributes:
        within: the share whose bound was within it in the end, exact computation counted.
        more: the share that was so only after more tokens had been retrieved.
        computed: the share that was computed exactly.
    """

    within: float
    more: float
    computed: float


def met_by(shares: Shares) -> Met:
    """Sum shares up."""
    at_once, more, computed, _ = shares
    return Met(at_once + more + computed, more, computed)


@state
class Tolerances:
    """Each sequence's tolerance, and the query heads of its steps and layers.

    Attributes:
        limits: `[batch]` float32, relative errors; infinity for a sequence without a tolerance.
        heads: `[batch]` uint32, all of them; as the others modulo 2^32.
        at_once: `[batch]` uint32, whose bound was within the tolerance at first.
        after_more: `[batch]` uint32, that were within it after more tokens had been retrieved.
        computed: `[batch]` uint32, that were computed exactly, since they were not.
    """

    limits: Array
    heads: Array
    at_once: Array
    after_more: Array
    computed: Array

    AXES: ClassVar = dict.fromkeys(
        ("limits", "heads", "at_once", "after_more", "computed"), ("sequences",)
    )


def init_tolerance(tolerance: float, batch: int) -> Tolerances | None:
    """Make the tolerances of a batch, all the same; None without one."""
    if not tolerance:
        return None
    counts = (jnp.zeros(batch, jnp.uint32) for _ in range(4))
    return Tolerances(jnp.full(batch, tolerance, jnp.float32), *counts)


def count(
    log: Tolerances,
    at_once: Bool[Array, "batch kv_heads group"],
    within: Bool[Array, "batch kv_heads group"],
    computed: bool,
) -> Tolerances:
    """Count a layer's heads.

    Args:
        log: of the run so far.
        at_once: which heads were within the tolerance at first.
        within: which are in the end.
        computed: whether the others were computed exactly.
    """

    def number(x: Array) -> Array:
        return jnp.sum(x, axis=(1, 2), dtype=jnp.uint32)

    return Tolerances(
        log.limits,
        log.heads + jnp.uint32(within[0].size),
        log.at_once + number(at_once),
        log.after_more + number(within & ~at_once),
        log.computed + (number(~within) if computed else jnp.uint32(0)),
    )


@functools.partial(jax.jit, donate_argnums=0)
def begin(log: Tolerances, slot: Int[Array, ""], limit: Float[Array, ""]) -> Tolerances:
    """Give a slot's next sequence its limit, with nothing counted yet."""
    counts = (x.at[slot].set(0) for x in (log.heads, log.at_once, log.after_more, log.computed))
    return Tolerances(log.limits.at[slot].set(limit), *counts)


def shares_of(log: Tolerances, slot: int | None = None) -> Shares | None:
    """Read a log: waits for the work that makes it.

    Args:
        log: of the run so far.
        slot: whose sequence's heads; None: all.

    Returns:
        shares of all heads; None before the first step.
    """
    heads, *parts = (
        int(np.asarray(x)[slot if slot is not None else slice(None)].sum(dtype=np.int64))
        for x in (log.heads, log.at_once, log.after_more, log.computed)
    )
    if not heads:
        return None
    at_once, more, computed = (part / heads for part in parts)
    return at_once, more, computed, max(0.0, 1 - at_once - more - computed)
