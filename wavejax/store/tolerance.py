"""What came of a tolerance: how many heads were within it at once, after more tokens, or not."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool

from wavejax._pytree import state


@state
class ToleranceLog:
    """Query heads of a run, over steps, layers and sequences.

    Attributes:
        heads: uint32 scalar, all of them; as the others modulo 2^32.
        at_once: uint32 scalar, whose bound was within the tolerance at first.
        after_more: uint32 scalar, that were within it after more tokens had been retrieved.
        computed: uint32 scalar, that were computed exactly, since they were not.
    """

    heads: Array
    at_once: Array
    after_more: Array
    computed: Array

    AXES: ClassVar = {"heads": (), "at_once": (), "after_more": (), "computed": ()}


def init_tolerance(tolerance: float) -> ToleranceLog | None:
    """Make an empty log; None without a tolerance."""
    return ToleranceLog(*(jnp.uint32(0) for _ in range(4))) if tolerance else None


def count(
    log: ToleranceLog,
    at_once: Bool[Array, "batch kv_heads group"],
    within: Bool[Array, "batch kv_heads group"],
    computed: bool,
) -> ToleranceLog:
    """Count a layer's heads.

    Args:
        log: of the run so far.
        at_once: which heads were within the tolerance at first.
        within: which are in the end.
        computed: whether the others were computed exactly.
    """

    def number(x: Array) -> Array:
        return jnp.sum(x, dtype=jnp.uint32)

    return ToleranceLog(
        log.heads + jnp.uint32(within.size),
        log.at_once + number(at_once),
        log.after_more + number(within & ~at_once),
        log.computed + (number(~within) if computed else jnp.uint32(0)),
    )


def shares_of(log: ToleranceLog) -> tuple[float, float, float, float] | None:
    """Read a log: waits for the work that makes it.

    Returns:
        of all heads the shares that were within the tolerance at once, after more tokens, by
        exact computation, and never; None before the first step.
    """
    heads = int(np.asarray(log.heads))
    if not heads:
        return None
    at_once, more, computed = (
        int(np.asarray(x)) / heads for x in (log.at_once, log.after_more, log.computed)
    )
    return at_once, more, computed, max(0.0, 1 - at_once - more - computed)
