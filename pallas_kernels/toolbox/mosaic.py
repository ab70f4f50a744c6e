"""What the kernels for TPUs share: products, where a block's elements are, and checks."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.toolbox import launch


def dot(a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
    """Multiply matrices, of which one may be of a wider dtype; in float32, and exact of float32."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return launch.dot(a.astype(dtype), b.astype(dtype), contract)


def places(part: Any, size: int, axis: int = 1) -> Any:
    """Count where a block's elements are: `[1, size]` int32, or `[size, 1]` along axis 0."""
    shape = (1, size) if axis else (size, 1)
    return part * size + lax.broadcasted_iota(jnp.int32, shape, axis)


def end_of(mark: Array) -> Array:
    """Find where the last mark of `[..., n]` bool ends: `[...]` int32, 0 for no mark."""
    n = jnp.arange(mark.shape[-1], dtype=jnp.int32)
    return jnp.max(jnp.where(mark, n + 1, 0), axis=-1, initial=0)


def last_block(end: Any, size: int) -> Any:
    """Find the number of the last block that holds something of what ends there; 0 for nothing."""
    return jnp.maximum(pl.cdiv(end, size) - 1, 0)


def check_heads(op: str, group: int, head_dim: int, *dtypes: Any) -> None:
    """Raise NotImplementedError for heads and dtypes that the kernels are not made for."""
    launch.check_heads(op, group, head_dim, *dtypes)
    if jnp.float16 in dtypes:
        raise NotImplementedError(
            f"{op}: dtype is float16; the TPU's kernel knows bfloat16 and float32"
        )
