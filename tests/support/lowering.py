"""Lowers functions for a GPU that is not there."""

import contextlib
from typing import Any

import jax

from pallas_kernels._compat import JAX_VERSION


def lower_for(platform: str, function: Any, *args: Any) -> str:
    """The program that `function` becomes on "cuda" or "rocm", kernels and all.

    Args:
        function: to be jitted.
        args: arrays, or `jax.ShapeDtypeStruct`.
    """
    with contextlib.ExitStack() as stack:
        if JAX_VERSION >= (0, 11):
            # From 0.11 on, Pallas asks which GPU it lowers for.
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

            device = AbstractDevice("NVIDIA H200", 132, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
