"""The semantics of `append_rows`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.types import Rows


def append_rows(
    store: Rows, rows: Array, layer: Array | int, sequence: Array | int, start: Array | int
) -> Rows:
    """See `pallas_kernels.append_rows`."""
    data = store.plain("append_rows")
    index = tuple(jnp.asarray(i, jnp.int32) for i in (layer, sequence, 0, start, 0, 0))
    if jax.typeof(data).memory_space == jax.memory.Space.Host:
        rows = jax.device_put(rows, jax.memory.Space.Host)
    return Rows(lax.dynamic_update_slice(data, rows[None, None].astype(data.dtype), index))
