"""Exact causal attention over a whole prompt: by cuDNN where it can, else in blocks."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED

SECTIONS = 8  # Each is compiled on its own, with no more keys than it can see.
QUERY_BLOCK = 128
LOGITS = 2**28  # Of one block at most: 1 GiB in float32.
SMALLEST_BLOCK = 16
OLDEST_GPU = (8, 0)  # The least compute capability that cuDNN's fused attention takes.
LARGEST_HEAD = 128  # On every such GPU.


def query_block(tokens: int, heads: int) -> int:
    """Count the queries attended to at a time: fewer where the logits would take much room."""
    block = QUERY_BLOCK
    while block > SMALLEST_BLOCK and block * heads * tokens > LOGITS:
        block //= 2
    return min(block, tokens)


def implementation_for(dtype: DTypeLike, head_dim: int) -> Literal["cudnn", "blocks"]:
    """How `causal_attention` works on JAX's default device; what is traced has no say in it.

    Args:
        dtype: of query, key and value.
        head_dim: of the heads.
    """
    capability = launch.compute_capability()
    if capability is None:
        return "blocks"
    fits = jnp.dtype(dtype).name in ("bfloat16", "float16") and capability >= OLDEST_GPU
    return "cudnn" if fits and head_dim <= LARGEST_HEAD and head_dim % 8 == 0 else "blocks"


def causal_attention(
    query: Float[Array, "tokens heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "tokens heads head_dim"]:
    """Attention of each token to itself and all before it; softmax in float32.

    On a CUDA GPU by cuDNN's fused kernel, for the dtypes and heads that it takes (see
    `implementation_for`); it needs no memory for logits. Else in plain JAX, by blocks.

    A value that is not finite makes the outputs of its own and all later tokens NaN, and no
    earlier ones: in a product with a weight of zero it would reach those too.
    """
    finite = jnp.isfinite(value)
    attend = by_blocks
    if implementation_for(query.dtype, query.shape[-1]) == "cudnn":
        attend = by_cudnn
    output = attend(query, key, jnp.where(finite, value, 0), scale=scale)
    # Of each kv head, the first token whose value is not finite.
    token = jnp.arange(value.shape[0], dtype=jnp.int32)
    bad = ~jnp.all(finite, axis=-1)
    first = jnp.min(jnp.where(bad, token[:, None], value.shape[0]), axis=0)
    first = jnp.repeat(first, query.shape[1] // value.shape[1])
    return jnp.where((token[:, None] < first)[..., None], output, jnp.nan)


def by_cudnn(
    query: Float[Array, "tokens heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "tokens heads head_dim"]:
    """`causal_attention` by cuDNN; raises NotImplementedError or RuntimeError where it is not."""
    # cuDNN wants one dtype; a cache's may be another than the model's.
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, implementation="cudnn"
    )


def by_blocks(
    query: Float[Array, "tokens heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "tokens heads head_dim"]:
    """`causal_attention` in plain JAX.

    The queries are cut into sections that see only the keys up to their own end, which saves
    nearly half of the products, and the sections into blocks, which bounds the memory that the
    logits take.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    block = query_block(tokens, heads)
    blocks = -(-tokens // block)
    section = -(-blocks // min(SECTIONS, blocks)) * block
    # Heads first and the group's queries side by side: plain batched matrix products, which run
    # several times as fast on a CPU as a contraction over five axes.
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    query = jnp.pad(query, ((0, blocks * block - tokens), (0, 0), (0, 0)))
    query = query.reshape(blocks, block, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(blocks, kv_heads, group * block, head_dim)
    in_block = jnp.tile(jnp.arange(block), group)

    outputs = []
    for start in range(0, tokens, section):
        end = min(start + section, tokens)
        seen_key, seen_value = key[:, :end], value[:, :end]

        def attend(
            operands: tuple[Array, Array], key: Array = seen_key, value: Array = seen_value
        ) -> Array:
            query, first = operands
            return attend_up_to(query, key, value, first + in_block, scale=scale)

        these = slice(start // block, -(-end // block))
        first = jnp.arange(blocks)[these] * block
        outputs.append(lax.map(attend, (query[these], first)))
    output = jnp.concatenate(outputs).reshape(blocks, kv_heads, group, block, head_dim)
    output = output.transpose(0, 3, 1, 2, 4).reshape(blocks * block, heads, head_dim)
    return output[:tokens]


def attend_up_to(
    query: Float[Array, "kv_heads queries head_dim"],
    key: Float[Array, "kv_heads tokens head_dim"],
    value: Float[Array, "kv_heads tokens head_dim"],
    last: Int[Array, " queries"],
    *,
    scale: float,
) -> Float[Array, "kv_heads queries head_dim"]:
    """Attend with each query to the tokens up to its last one.

    Args:
        query: of every kv head, the queries that share it.
        key, value: heads first.
        last: int32, the last token that each query sees, from 0.
        scale: of the logits.

    Returns:
        the output, in the query's dtype; products are summed in float32.
    """
    logits = scale * jnp.einsum("hnd,hkd->hnk", query, key, preferred_element_type=jnp.float32)
    seen = jnp.arange(key.shape[1]) <= last[:, None]
    logits = jnp.where(seen, logits, MASKED)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    output = jnp.einsum(
        "hnk,hkd->hnd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (output / jnp.sum(weights, axis=-1, keepdims=True)).astype(query.dtype)
