"""What an audit found: true errors of heads that were also computed exactly."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from wavejax._pytree import state

# Of the newest so many a state keeps.
KEPT = 4096


@state
class AuditLog:
    """The newest errors of a run.

    Attributes:
        errors: `[KEPT]` float32, |output - exact| / |exact| of one query head each; the n-th audit
            writes at n modulo KEPT.
        count: int32 scalar, audits so far.
    """

    errors: Array
    count: Array

    AXES: ClassVar = {"errors": ("audits",), "count": ()}


def init_audit(share: float) -> AuditLog | None:
    """Make an empty log; None where nothing is audited."""
    return AuditLog(jnp.zeros(KEPT, jnp.float32), jnp.int32(0)) if share else None


def errors_of(log: AuditLog) -> Float[np.ndarray, " kept"]:
    """Read the errors that a log keeps; waits for the work that makes it."""
    return np.asarray(log.errors)[: int(log.count)]
