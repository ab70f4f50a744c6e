"""JAX's modes in which ops are computed, whatever modes the caller's program has set."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_NARROW = {"int64": jnp.int32, "uint64": jnp.uint32}


@contextlib.contextmanager
def standard_modes() -> Iterator[None]:
    """Trace and lower in JAX's standard modes, in this thread, until it ends.

    Those that say which types numbers get and what may be mixed: 64-bit types, promotions of dtypes
    and of ranks.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def narrowed(operands: Any) -> Any:
    """Return a pytree with its whole numbers of 64 bits in 32: all that ops are given fit there."""
    return jax.tree.map(_narrow, operands)


def has_wide_floats(operands: Any) -> bool:
    """Whether an array is in float64: such an op is computed in the caller's modes."""
    return any(getattr(x, "dtype", None) == "float64" for x in jax.tree.leaves(operands))


def _narrow(x: Any) -> Any:
    dtype = _NARROW.get(str(getattr(x, "dtype", None)))
    return x if dtype is None else jnp.asarray(x).astype(dtype)
