"""Exact causal attention over a whole prompt, in blocks."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._numerics import MASKED

SECTIONS = 8  # Each is compiled on its own, with no more keys than it can see.
QUERY_BLOCK = 256


def causal_attention(
    query: Float[Array, "tokens heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "tokens heads head_dim"]:
    """Attention of each token to itself and all before it; softmax in float32.

    The queries are cut into sections that see only the keys up to their own end, which saves
    nearly half of the products, and the sections into blocks, which bounds the memory that the
    logits take.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    block = min(QUERY_BLOCK, tokens)
    blocks = -(-tokens // block)
    section = -(-blocks // min(SECTIONS, blocks)) * block

    outputs = []
    for start in range(0, tokens, section):
        end = min(start + section, tokens)
        outputs.append(_section(query[start:end], key[:end], value[:end], start, block, scale))
    return jnp.concatenate(outputs).reshape(tokens, heads, head_dim)


def _section(query: Array, key: Array, value: Array, start: int, block: int, scale: float) -> Array:
    size = query.shape[0]
    padded = -(-size // block) * block
    query = jnp.pad(query, ((0, padded - size), (0, 0), (0, 0), (0, 0)))
    query = query.reshape(-1, block, *query.shape[1:])
    first = start + block * jnp.arange(query.shape[0])
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)

    def attend(operands: tuple[Array, Array]) -> Array:
        query, first = operands
        logits = scale * jnp.einsum(
            "qhgd,hkd->hgqk", query, key, preferred_element_type=jnp.float32
        )
        seen = jnp.arange(key.shape[1])[None, :] <= first + jnp.arange(block)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
        return jnp.einsum("hgqk,hkd->qhgd", weights.astype(value.dtype), value)

    output = lax.map(attend, (query, first))
    return output.reshape(padded, *output.shape[2:])[:size]
