"""Exact causal attention of one block of a prompt's queries, for prompts read part by part."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from wavejax.attention.causal import SECTIONS, attend_up_to, implementation_for, query_block

CUDNN_BLOCK = 2048  # Queries at a time where cuDNN attends: enough to keep a GPU busy.


def block_tokens(tokens: int, heads: int, dtype: DTypeLike, head_dim: int) -> int:
    """Count the queries attended to at a time: a divisor of the prompt's padded tokens.

    Args:
        tokens: the prompt's, padded.
        heads: query heads.
        dtype: of query, key and value.
        head_dim: of the heads.
    """
    by_cudnn = implementation_for(dtype, head_dim) == "cudnn"
    return math.gcd(tokens, CUDNN_BLOCK if by_cudnn else query_block(tokens, heads))


def section_blocks(blocks: int) -> int:
    """Count the blocks of a section: those of a section see the keys up to its end."""
    return -(-blocks // min(SECTIONS, blocks))


def attend_block(
    query: Float[Array, "block heads head_dim"],
    key: Float[Array, "kv_heads tokens head_dim"],
    value: Float[Array, "kv_heads tokens head_dim"],
    number: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "block heads head_dim"]:
    """Attend with a block's tokens to themselves and all before; see `causal.causal_attention`.

    Args:
        query: the block's.
        key, value: the whole prompt's, heads first; those past the block may be anything.
        number: int32, the block's, from 0.
        scale: of the logits.

    Returns:
        the output, in the query's dtype. NaN for tokens at or after one whose value is not finite.
    """
    block, heads, head_dim = query.shape
    kv_heads, tokens = key.shape[:2]
    token = jnp.arange(tokens, dtype=jnp.int32)
    finite = jnp.all(jnp.isfinite(value), axis=-1)
    first_bad = jnp.min(jnp.where(finite, tokens, token), axis=-1)
    attend = _by_sections
    if implementation_for(query.dtype, head_dim) == "cudnn":
        attend = _by_cudnn
    output = attend(query, key, jnp.where(finite[..., None], value, 0), number, scale=scale)
    own = number * block + jnp.arange(block, dtype=jnp.int32)
    first_bad = jnp.repeat(first_bad, heads // kv_heads)
    return jnp.where((own[:, None] < first_bad)[..., None], output, jnp.nan)


def _by_sections(query: Array, key: Array, value: Array, number: Array, *, scale: float) -> Array:
    """In plain JAX: the same products as `causal.by_blocks` of the whole prompt."""
    block, heads, head_dim = query.shape
    kv_heads, tokens = key.shape[:2]
    group = heads // kv_heads
    section = section_blocks(tokens // block)
    ends = range(section * block, tokens + section * block, section * block)
    query = query.reshape(block, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    query = query.reshape(kv_heads, group * block, head_dim)
    place = number * block + jnp.tile(jnp.arange(block), group)

    def attend(end: int, query: Array) -> Array:
        return attend_up_to(query, key[:, :end], value[:, :end], place, scale=scale)

    branches = [functools.partial(attend, min(end, tokens)) for end in ends]
    output = lax.switch(number // section, branches, query)
    output = output.reshape(kv_heads, group, block, head_dim).transpose(2, 0, 1, 3)
    return output.reshape(block, heads, head_dim)


def _by_cudnn(query: Array, key: Array, value: Array, number: Array, *, scale: float) -> Array:
    """By cuDNN: the block's own tokens, causally, and all before it; merged by log-sum-exp."""
    block = query.shape[0]
    key, value = (jnp.swapaxes(x, 0, 1).astype(query.dtype) for x in (key, value))
    before = number * block
    own_key, own_value = (lax.dynamic_slice_in_dim(x, before, block) for x in (key, value))
    attend = functools.partial(
        jax.nn.dot_product_attention, scale=scale, implementation="cudnn", return_residual=True
    )
    own, own_mass = attend(query[None], own_key[None], own_value[None], is_causal=True)
    # At least one key, whose part is left out where there is none before.
    length = jnp.maximum(before, 1).astype(jnp.int32)[None]
    past, past_mass = attend(query[None], key[None], value[None], key_value_seq_lengths=length)
    past_mass = jnp.where(before > 0, past_mass, -jnp.inf)
    most = jnp.maximum(own_mass, past_mass)
    shares = jnp.exp(own_mass - most)[..., None], jnp.exp(past_mass - most)[..., None]
    total = shares[0] + shares[1]
    merged = (shares[0] * own + shares[1] * past) / total
    return merged[0].astype(query.dtype)
