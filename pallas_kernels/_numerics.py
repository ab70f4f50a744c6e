"""The few numeric conventions that all ops share."""

from typing import Any

import jax.numpy as jnp

# Masks are finite: -inf minus -inf is NaN, and rows with nothing in them do occur. Half of it is
# still far below any logit, so `x > MASKED / 2` tells a real value from a mask.
MASKED = -1e30

# Stands for no token, no cluster, no slot in an int32 list: past the end of every array, so that a
# scatter in "drop" mode leaves it out and none has to be masked apart.
NO_ID = 2**31 - 1


def log_sum_exp(x: Any, axis: int) -> Any:
    """log(sum(exp(x))) in float32; MASKED where everything along the axis is masked."""
    x = x.astype(jnp.float32)
    peak = jnp.max(x, axis=axis, keepdims=True)
    total = jnp.sum(jnp.where(x > MASKED / 2, jnp.exp(x - peak), 0.0), axis=axis)
    peak = jnp.squeeze(peak, axis)
    return jnp.where(total > 0, peak + jnp.log(jnp.maximum(total, 1e-30)), MASKED)


def log_count(count: Any) -> Any:
    """log of an integer count in float32; MASKED for zero."""
    count = count.astype(jnp.float32)
    return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1.0)), MASKED)
