"""The pooled covariance in the index: how members lie about their clusters' means, in each head."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from wavejax.config import WaveConfig


def init_covariance(
    config: WaveConfig, stack: tuple[int, ...], head_dim: int, dtype: DTypeLike
) -> Array | None:
    """Make room for the covariance of heads; None where the settings want none.

    Args:
        config: the settings.
        stack: `(layers, batch, kv_heads)`.
        head_dim: numbers in a key.
        dtype: the model's.
    """
    shape = (*stack, 2, head_dim, head_dim)
    return jnp.zeros(shape, dtype) if config.pooled_covariance else None


def put_covariance(
    covariance: Array | None,
    keys: Float[Array, "kv_heads tokens head_dim"],
    values: Float[Array, "kv_heads tokens head_dim"],
    members: Bool[Array, "kv_heads tokens"],
    at: tuple[Array, Array],
    *,
    new: Bool[Array, ""],
) -> Array | None:
    """Find a segment's covariance and write it, if it is a sequence's first; None stays None.

    Both matrices are over the mean square of a key's residual along a direction. So with residuals
    of length zero, all keys of a cluster alike, there is none.

    Args:
        covariance: the index's.
        keys, values: residuals of the segment's, by index place, float32.
        members: which places have a token.
        at: layer and sequence, int32.
        new: whether it is the first segment of the sequence.
    """
    if covariance is None:
        return None
    keys, values = (jnp.where(members[..., None], x, 0) for x in (keys, values))
    # Products of residuals, which are small and of either sign, in float32.
    pair = [
        jnp.einsum("hti,htj->hij", x, keys, precision=lax.Precision.HIGHEST) for x in (keys, values)
    ]
    trace = jnp.trace(pair[0], axis1=-2, axis2=-1)[:, None, None, None]
    matrices = jnp.stack(pair, axis=1) * keys.shape[-1] / jnp.where(trace == 0, 1.0, trace)
    held = covariance[at]
    # Values may vary far more than keys do, which float16 would not hold. NaN stays.
    most = float(jnp.finfo(held.dtype).max)
    matrices = jnp.clip(matrices, -most, most).astype(held.dtype)
    return covariance.at[at].set(jnp.where(new, matrices, held))
