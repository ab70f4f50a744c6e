"""The semantics of `attend_dense`, in plain JAX."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.numerics import log_total
from pallas_kernels.rounding import dequantise
from pallas_kernels.types import MASKED, Rows


def attend_dense(
    query: Array,
    keys: Rows,
    values: Rows,
    lengths: Array,
    layer: Array | int,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """See `pallas_kernels.attend_dense`."""
    seen = jnp.arange(keys.shape[3]) < lengths[:, None]
    key, value = (dequantise(rows.of_layer(layer)) for rows in (keys, values))
    logits = scale * jnp.einsum("bhgd,bhtd->bhgt", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None, None, :], logits, MASKED)
    peak = jnp.max(logits, axis=-1)
    mass = jnp.where(seen[:, None, None, :], jnp.exp(logits - peak[..., None]), 0.0)
    total = jnp.sum(mass, axis=-1)
    # What is not seen may be NaN, which a weight of zero would not keep out.
    of_seen = jnp.where(seen[:, None, :, None], value.astype(jnp.float32), 0.0)
    weights = mass / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.einsum("bhgt,bhtd->bhgd", weights, of_seen), log_total(peak, total)
