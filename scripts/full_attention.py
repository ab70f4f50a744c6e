"""Full attention of one decode step, the baseline: cuDNN's by way of JAX, and a Pallas kernel."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from gpu_timing import time_calls
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import pallas_kernels as ops
from pallas_kernels import _pallas
from pallas_kernels._numerics import MASKED


@dataclass(frozen=True)
class Split:
    """How the kernel cuts the work: pieces of each row's tokens, tokens a round, Triton's own."""

    splits: int
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


def full_attention(
    query: Array,
    keys: Array,
    values: Array,
    *,
    scale: float,
    split: Split,
    interpret: bool = False,
) -> Array:
    """Attends to all tokens: flash decoding, split over the tokens and merged.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        keys, values: `[batch, kv_heads, tokens, head_dim]`.
        scale: multiplies every product.
        split: how to cut the work.
        interpret: run the kernel as plain JAX.

    Returns:
        `[batch, kv_heads, group, head_dim]` float32.
    """
    batch, kv_heads, group, head_dim = query.shape
    shape = (split.splits, batch, kv_heads, group)
    outputs, logsumexps = _pallas.call(
        functools.partial(_attend, tokens=keys.shape[2], scale=scale, split=split),
        (query, keys, values),
        (
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        (split.splits, kv_heads, batch),
        name="full_attention",
        num_warps=split.num_warps,
        num_stages=split.num_stages,
        interpret=interpret,
    )
    return ops.merge_states(outputs, logsumexps, implementation="xla")[0]


def _attend(
    query: Any,
    keys: Any,
    values: Any,
    outputs: Any,
    logsumexps: Any,
    *,
    tokens: int,
    scale: float,
    split: Split,
) -> None:
    """One split of one row: online softmax over its tokens."""
    part, head, sequence = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, head_dim = query.shape[2:]
    heads = jnp.arange(max(_pallas.DOT_TILE, _pallas.tile(group)))
    dims = jnp.arange(_pallas.tile(head_dim))
    in_group, in_dims = heads < group, dims < head_dim
    place = (sequence, head, jnp.minimum(heads, group - 1)[:, None], dims[None, :])
    q = plt.load(query.at[place], mask=in_group[:, None] & in_dims[None, :], other=0.0)
    blocks = pl.cdiv(pl.cdiv(tokens, split.block), split.splits)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def visit(i: Any, carry: Any) -> Any:
        total, weight, peak = carry
        token = (part * blocks + i) * split.block + jnp.arange(split.block)
        here = (sequence, head, token[:, None], dims[None, :])
        mask = (token < tokens)[:, None] & in_dims[None, :]
        k = plt.load(keys.at[here], mask=mask, other=0.0)
        logits = scale * plt.dot(q, k.T, precision=precision)
        logits = jnp.where((token < tokens)[None, :], logits, MASKED)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        mass = jnp.exp(logits - higher[:, None])
        mass = jnp.where((token < tokens)[None, :], mass, 0.0)
        fade = jnp.exp(peak - higher)
        v = plt.load(values.at[here], mask=mask, other=0.0)
        total = total * fade[:, None] + plt.dot(mass.astype(v.dtype), v, precision=precision)
        return total, weight * fade + jnp.sum(mass, axis=1), higher

    start = (
        jnp.zeros((heads.shape[0], dims.shape[0]), jnp.float32),
        jnp.zeros(heads.shape[0], jnp.float32),
        jnp.full(heads.shape[0], MASKED, jnp.float32),
    )
    total, weight, peak = lax.fori_loop(0, blocks, visit, start)
    found = weight > 0
    output = total / jnp.where(found, weight, 1.0)[:, None]
    logsumexp = jnp.where(found, peak + jnp.log(jnp.where(found, weight, 1.0)), MASKED)
    at = (part, sequence, head, heads)
    plt.store(
        outputs.at[part, sequence, head, heads[:, None], dims[None, :]],
        output,
        mask=in_group[:, None] & in_dims[None, :],
    )
    plt.store(logsumexps.at[at], logsumexp, mask=in_group)


def cudnn_attention(query: Array, keys: Array, values: Array, *, scale: float) -> Array:
    """The same by cuDNN; keys and values `[batch, tokens, kv_heads, head_dim]`."""
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
    """The same in plain JAX; keys and values `[batch, kv_heads, tokens, head_dim]`."""
    logits = scale * jnp.einsum("bhgd,bhtd->bhgt", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("bhgt,bhtd->bhgd", weights, values, preferred_element_type=jnp.float32)


def splits_to_try(rows: int, tokens: int) -> list[Split]:
    """A few splits that give an H200's 132 multiprocessors some programs each."""
    most = max(1, tokens // 256)
    splits = [min(most, max(1, math.ceil(132 * each / rows))) for each in (4, 8)]
    return [Split(splits[0]), Split(splits[0], block=128, num_warps=8), Split(splits[1])]


def time_full_attention(query: Array, keys: Array, values: Array, scale: float) -> dict[str, Any]:
    """Seconds of every baseline that works here, the error of every other, and the best.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        keys, values: `[batch, kv_heads, tokens, head_dim]`.
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
        rows, tokens = keys.shape[0] * keys.shape[1], keys.shape[2]
        for split in splits_to_try(rows, tokens):
            name = f"pallas {split.splits}x{split.block} {split.num_warps} warps"
            measure(name, functools.partial(full_attention, split=split), (query, keys, values))
        by_token = jax.jit(lambda k, v: (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        measure("cudnn", cudnn_attention, (query, *by_token(keys, values)))
    best = min(times, key=lambda name: times[name]) if times else None
    return {"seconds": times, "errors": errors, "best": best}
