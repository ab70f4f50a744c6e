"""Full attention of one decode step, the baseline: cuDNN's by way of JAX, and a Pallas kernel."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from gpu_timing import time_calls
from jax import Array

from pallas_kernels.attend_dense import triton as attend_dense
from pallas_kernels.types import Rows


def full_attention(
    query: Array, keys: Array, values: Array, *, scale: float, config: attend_dense.Config
) -> Array:
    """Attends to all tokens by the kernel of `attend_dense`.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: like the keys.
        scale: multiplies every product.
        config: how to cut the work.

    Returns:
        `[batch, kv_heads, group, head_dim]` float32.
    """
    lengths = jnp.full(keys.shape[0], keys.shape[2], jnp.int32)
    output, _ = attend_dense.attend_dense(
        query, Rows(keys[None]), Rows(values[None]), lengths, 0, scale=scale, config=config
    )
    return output


def cudnn_attention(query: Array, keys: Array, values: Array, *, scale: float) -> Array:
    """Return the same by cuDNN; keys and values `[batch, tokens, kv_heads, head_dim]`."""
    batch, kv_heads, group, head_dim = query.shape
    output = jax.nn.dot_product_attention(
        query.reshape(batch, 1, kv_heads * group, head_dim),
        keys,
        values,
        scale=scale,
        implementation="cudnn",
    )
    return output.reshape(query.shape)


def plain_attention(query: Array, keys: Array, values: Array, *, scale: float) -> Array:
    """Return the same in plain JAX; keys and values `[batch, kv_heads, tokens, head_dim]`."""
    logits = scale * jnp.einsum("bhgd,bhtd->bhgt", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("bhgt,bhtd->bhgd", weights, values, preferred_element_type=jnp.float32)


def configs_to_try(query: Array, tokens: int) -> list[attend_dense.Config]:
    """Return the kernel's own config and others.

    These are a few that give an H200's 132 multiprocessors more programs.
    """
    batch, kv_heads, _, head_dim = query.shape
    rows = batch * kv_heads
    own = attend_dense.heuristic(rows, tokens, head_dim, query.dtype.itemsize)
    more = min(max(1, tokens // 256), math.ceil(132 * 8 / rows))
    wider = dataclasses.replace(own, block=2 * own.block, num_warps=8)
    return list(dict.fromkeys([own, wider, dataclasses.replace(own, splits=more)]))


def time_full_attention(query: Array, keys: Array, values: Array, scale: float) -> dict[str, Any]:
    """Seconds of every baseline that works here, the error of every other, and the best.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: like the keys.
        scale: multiplies every product.
    """
    times: dict[str, float] = {}
    errors: dict[str, str] = {}
    expected: list[Array] = []

    def measure(name: str, attend: Callable[..., Array], operands: tuple[Array, ...]) -> None:
        def call(query: Array, operands: Any, state: Any) -> tuple[Array, Any]:
            return attend(query, *operands, scale=scale), state

        try:
            result = jax.jit(functools.partial(attend, scale=scale))(*operands)
            result = result.astype(jnp.float32)
            if expected:
                error = float(jnp.linalg.norm(result - expected[0]) / jnp.linalg.norm(expected[0]))
                if not error < 2e-2:
                    raise ArithmeticError(f"its result is off by {error:.1e}")
            elif not bool(jnp.isfinite(result).all()):
                raise ArithmeticError("its result is not finite")
            else:
                expected.append(result)
            times[name] = time_calls(call, operands[1:], links=operands[:1], calls=8)[0].median
        except Exception as error:  # Whatever fails, the others are still worth measuring.
            errors[name] = f"{type(error).__name__}: {error}"[:500]

    gpu = jax.default_backend() == "gpu"
    measure("xla", plain_attention, (query, keys, values))
    if gpu:
        for config in configs_to_try(query, keys.shape[2]):
            name = f"pallas {config.splits}x{config.block} {config.num_warps} warps"
            measure(name, functools.partial(full_attention, config=config), (query, keys, values))
        by_token = jax.jit(lambda k, v: (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        measure("cudnn", cudnn_attention, (query, *by_token(keys, values)))
    best = min(times, key=lambda name: times[name]) if times else None
    return {"seconds": times, "errors": errors, "best": best}
