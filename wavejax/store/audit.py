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
        sequences: `[KEPT]` int32, whose head it was.
        count: int32 scalar, audits so far.
    """

    errors: Array
    sequences: Array
    count: Array

    AXES: ClassVar = {"errors": ("audits",), "sequences": ("audits",), "count": ()}


def init_audit(share: float) -> AuditLog | None:
    """Make an empty log; None where nothing is audited."""
    if not share:
        return None
    return AuditLog(jnp.zeros(KEPT, jnp.float32), jnp.full(KEPT, -1, jnp.int32), jnp.int32(0))


def errors_of(log: AuditLog, sequence: int | None = None) -> Float[np.ndarray, " kept"]:
    """Read the errors that a log keeps, of one sequence or all; waits for the work that makes it.

    Args:
        log: of the run so far.
        sequence: its place in the batch; None: all.
    """
    errors = np.asarray(log.errors)[: int(log.count)]
    if sequence is None:
        return errors
    return errors[np.asarray(log.sequences)[: int(log.count)] == sequence]
