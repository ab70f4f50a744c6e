"""Calls of the kernel that multiplies by levels: a part of `kernel_cases`."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.levels import Levels
from pallas_kernels.multiply_levels import triton

OUT, WIDTH = 4096, 14336


def _of(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def product_calls(dtype: str) -> dict[str, Any]:
    """Products with a layer's matrix in several formats, of tokens in a dtype."""
    nibbles, levels = _of(OUT, WIDTH // 2, dtype=jnp.uint8), _of(OUT, WIDTH, dtype=jnp.int8)
    small, smaller = (_of(OUT, WIDTH // n, dtype=jnp.int8) for n in (32, 16))
    factors, halves = (_of(OUT, WIDTH // n, dtype=jnp.float16) for n in (256, 32))
    int4 = Levels(nibbles, _of(OUT, WIDTH // 32, dtype=jnp.bfloat16))
    calls = {
        "int4-1": int4,
        "int4-32": int4,
        "Q4_1-8": Levels(nibbles, halves, minima=halves),
        "Q4_K-16": Levels(nibbles, small, factors, small, factors),
        "Q6_K-16": Levels(levels, smaller, factors),
    }
    return {
        f"multiply_levels-{name}": (
            triton.multiply_levels,
            (_of(int(name.split("-")[1]), WIDTH, dtype=dtype), matrix),
            {"multiply_levels"},
        )
        for name, matrix in calls.items()
    }
