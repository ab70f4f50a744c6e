"""What differs between JAX 0.10, 0.11 and 0.12. Nothing else here may ask for JAX's version."""

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


def mosaic_gpu_load(module: Any, ref: Any, layout: Any) -> Any:
    """Load what a ref holds into registers, in a layout of Mosaic's; inside a kernel.

    Args:
        module: Pallas' for Mosaic GPU.
        ref: in shared or in device memory.
        layout: of `module.Layout`.
    """
    index = (...,) if JAX_VERSION < (0, 11) else ()
    return module.load(ref, *index, layout=layout, optimized=False)


def mosaic_gpu_store(module: Any, ref: Any, value: Any) -> None:
    """Store registers, whatever their layout; inside a kernel of Mosaic GPU.

    Args:
        module: Pallas' for Mosaic GPU.
        ref: in shared or in device memory.
        value: of the ref's shape.
    """
    if JAX_VERSION < (0, 12):
        ref[...] = value  # which takes layouts that make it slow, too
    else:
        module.store(ref, value, optimized=False)
