"""What differs between JAX 0.10 and 0.11. Nothing else here may ask for JAX's version."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compute_on import compute_on

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def run_on_host(function: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """Run `function` on the host's processor, inside the program that calls this.

    Args:
        function: from arrays in host memory to one array in host memory. It may use `jax.lax` only:
            most of `jnp` makes constants in device memory, which JAX refuses to mix with the
            operands.
        operands: arrays in host memory.

    Returns:
        The function's result, in host memory.
    """
    if JAX_VERSION < (0, 11):
        return compute_on("device_host")(jax.jit(function))(*operands)  # type: ignore[call-arg]
    on_host: Any = compute_on
    return on_host(function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)(
        *operands
    )
