"""The semantics of `append_rows`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.rounding import held_as
from pallas_kernels.types import Rows


def append_rows(
    store: Rows, rows: Array, layer: Array | int, sequence: Array | int, start: Array | int
) -> Rows:
    """See `pallas_kernels.append_rows`."""
    new = held_as(rows, store)
    return jax.tree.map(lambda x, block: write(x, block, layer, sequence, start), store, new)


def write(
    stack: Array, block: Array, layer: Array | int, sequence: Array | int, start: Array | int
) -> Array:
    """Write `[kv_heads, new, ...]` into `[layers, batch, kv_heads, tokens, ...]`, from a token on.

    Args:
        stack: in host memory or on the device.
        block: on the device; converted to the stack's dtype.
        layer, sequence, start: int32, where to.
    """
    numbers = (layer, sequence, 0, start, *(0,) * (stack.ndim - 4))
    index = tuple(jnp.asarray(i, jnp.int32) for i in numbers)
    if jax.typeof(stack).memory_space == jax.memory.Space.Host:
        block = jax.device_put(block, jax.memory.Space.Host)
    return lax.dynamic_update_slice(stack, block[None, None].astype(stack.dtype), index)
