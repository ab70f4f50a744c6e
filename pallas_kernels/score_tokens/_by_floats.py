"""What one program of `score_tokens` does with a query in floats, on any GPU."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import backend as plt
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.score_tokens._members import Members, find_members
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED


def score(
    query_ref: Any,
    logits_ref: Any,
    logsumexp_ref: Any,
    members: Members,
    codes_ref: Any,
    scales_ref: Any,
    at: tuple[Any, Any, Any],
    place: Any,
    valid: Any,
    *,
    scale: float,
    head_dim: int,
) -> Any:
    """Compute the masses' logarithms of a block of a row's candidates: `[block]` float32.

    Args:
        query_ref: `[batch, kv_heads, parts, group, head_dim]` bfloat16, from `_query.split`.
        logits_ref, logsumexp_ref, codes_ref, scales_ref: the op's operands.
        members: the candidates.
        at: layer, sequence and kv head.
        place, valid: `[block]`, places in the list of candidates, and which there are.
        scale, head_dim: of query and keys.
    """
    layer, b, h = at
    group = logits_ref.shape[2]
    _, cluster, position = find_members(members, at, place, valid)
    a = plt.load(scales_ref.at[layer, b, h, position], mask=valid, other=0)
    a = scale * a.astype(jnp.float32)
    product = _products(query_ref, codes_ref, layer, b, h, position, valid, head_dim)
    heads = jnp.arange(launch.DOT_TILE)
    in_group = (heads < group)[None, :]
    estimate = plt.load(
        logits_ref.at[b, h, heads[None, :], cluster[:, None]],
        mask=valid[:, None] & in_group,
        other=0,
    )
    normaliser = plt.load(logsumexp_ref.at[b, h, heads], mask=heads < group, other=0)
    estimate -= normaliser[None, :]
    estimate = jnp.where(in_group, estimate + a[:, None] * product, MASKED)
    peak = jnp.max(estimate, axis=1)
    powers = jnp.exp2(LOG2_E * (estimate - peak[:, None]))
    return peak + jnp.log(jnp.sum(powers, axis=1))


def _products(
    query_ref: Any,
    codes_ref: Any,
    layer: Any,
    b: Any,
    h: Any,
    position: Any,
    valid: Any,
    head_dim: int,
) -> Any:
    """Multiply codes and query in the matrix units: `[block, DOT_TILE]` float32.

    Args:
        query_ref: `[batch, kv_heads, parts, group, head_dim]` bfloat16, from `_query.split`.
        codes_ref: as `score_tokens` has them.
        layer, b, h: which head's.
        position, valid: `[block]` int32 and bool, index positions, and which of them to read.
        head_dim: of the codes.
    """
    _, _, parts, group, _ = query_ref.shape
    dim = jnp.arange(launch.tile(head_dim))
    words = plt.load(
        codes_ref.at[layer, b, h, position[:, None], (dim // 32)[None, :]],
        mask=valid[:, None] & (dim < head_dim)[None, :],
        other=0,
    )
    bits = lax.shift_right_logical(
        words, jnp.broadcast_to((dim % 32)[None, :], words.shape).astype(jnp.uint32)
    )
    signs = jnp.where((bits & 1) == 1, 1.0, -1.0).astype(jnp.bfloat16)
    g = jnp.arange(launch.DOT_TILE)
    product = jnp.zeros((position.shape[0], launch.DOT_TILE), jnp.float32)
    for part in range(parts):
        query = plt.load(
            query_ref.at[b, h, jnp.int32(part), g[None, :], dim[:, None]],
            mask=(g < group)[None, :] & (dim < head_dim)[:, None],
            other=0,
        )
        product += jnp.dot(signs, query, preferred_element_type=jnp.float32)
    return product
