"""Causal attention over a plain KV cache: the simplest that a decoder can be tested with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.config import ModelConfig

State = tuple[Array, Array, Array]
"""keys and values ``[layers, batch, capacity, kv_heads, head_dim]``, tokens held so far (int32)."""


def empty_state(config: ModelConfig, batch: int, capacity: int) -> State:
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0)


def advance(state: State, tokens: int) -> State:
    """Counts the tokens whose keys and values every layer has stored."""
    keys, values, length = state
    return keys, values, length + tokens


def attend(
    layer: Int[Array, ""],
    query: Float[Array, "batch tokens num_heads head_dim"],
    key: Float[Array, "batch tokens num_kv_heads head_dim"],
    value: Float[Array, "batch tokens num_kv_heads head_dim"],
    state: State,
) -> tuple[Float[Array, "batch tokens num_heads head_dim"], State]:
    keys, values, length = state
    keys = jax.lax.dynamic_update_slice(
        keys, key[None].astype(keys.dtype), (layer, 0, length, 0, 0)
    )
    values = jax.lax.dynamic_update_slice(
        values, value[None].astype(keys.dtype), (layer, 0, length, 0, 0)
    )
    group = query.shape[2] // key.shape[2]
    scores = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(keys[layer], group, axis=2))
    last_seen = length + jnp.arange(query.shape[1])
    visible = jnp.arange(keys.shape[2]) <= last_seen[:, None]
    scores = jnp.where(visible, scores * query.shape[3] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    output = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(values[layer], group, axis=2))
    return output, (keys, values, length)
