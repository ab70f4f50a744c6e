"""Full attention with the interface of wave attention: the answer to compare with."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from models.config import ModelConfig
from pallas_kernels.types import MASKED
from wavejax._pytree import state as pytree
from wavejax.attention.causal import causal_attention


@pytree
class DenseState:
    """The KV cache of all layers and sequences.

    Attributes:
        keys, values: `[layers, batch, kv_heads, tokens, head_dim]`.
        tokens: `[batch]` int32, how many tokens each sequence holds.
    """

    keys: Array
    values: Array
    tokens: Array


@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """Full attention; see `WaveAttention` for the methods."""

    def init_state(
        self, model: ModelConfig, batch: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> DenseState:
        """An empty state with room for so many tokens a sequence."""
        room = prompt_tokens + new_tokens
        shape = (model.num_layers, batch, model.num_kv_heads, room, model.head_dim)
        zeros = jnp.zeros(shape, dtype)
        # Two arrays, not one twice: a buffer cannot be donated twice.
        return DenseState(zeros, jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def lengths(self, state: DenseState) -> Int[Array, " batch"]:
        """Tokens that each sequence holds; the next one's position."""
        return state.tokens

    def is_full(self, state: DenseState) -> Bool[Array, " batch"]:
        """Sequences that have no room for another token."""
        return self.remaining(state) <= 0

    def remaining(self, state: DenseState) -> Int[Array, " batch"]:
        """How many tokens more each sequence has room for."""
        return state.keys.shape[3] - state.tokens

    def prefill(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "1 tokens heads head_dim"],
        key: Float[Array, "1 tokens kv_heads head_dim"],
        value: Float[Array, "1 tokens kv_heads head_dim"],
        state: DenseState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> tuple[Float[Array, "1 tokens heads head_dim"], DenseState]:
        """Attends to a prompt and writes its cache, in one layer."""
        del length  # What lies past it is overwritten before it is ever attended to.
        scale = 1.0 / math.sqrt(query.shape[-1])
        output = causal_attention(query[0], key[0], value[0], scale=scale)[None]

        def write(cache: Array, new: Array) -> Array:
            block = jnp.swapaxes(new, 1, 2)[None].astype(cache.dtype)
            # Of the same type also where Python's numbers are of 64 bits.
            start = (jnp.asarray(i, jnp.int32) for i in (layer, sequence, 0, 0, 0))
            return lax.dynamic_update_slice(cache, block, tuple(start))

        keys, values = write(state.keys, key), write(state.values, value)
        return output, DenseState(keys, values, state.tokens)

    def finish_prefill(
        self, state: DenseState, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> DenseState:
        """Sets a sequence's length after all layers have been prefilled."""
        return dataclasses.replace(state, tokens=state.tokens.at[sequence].set(length))

    def decode(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], DenseState]:
        """One decode step of every sequence, in one layer. `advance` must follow the last one."""
        state = self.append(layer, key, value, state)
        batch, _, heads, head_dim = query.shape
        kv_heads = key.shape[2]
        output, _ = ops.attend_dense(
            query.reshape(batch, kv_heads, heads // kv_heads, head_dim),
            state.keys,
            state.values,
            state.tokens + 1,
            layer,
            scale=1.0 / math.sqrt(head_dim),
        )
        return output.astype(query.dtype).reshape(query.shape), state

    def append(
        self,
        layer: Int[Array, ""],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> DenseState:
        """Writes a step's keys and values in one layer. Does not move `tokens`."""
        batch, _, kv_heads, _ = key.shape
        b, h = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :]
        at = (layer, b, h, state.tokens[:, None])

        def write(cache: Array, new: Array) -> Array:
            return cache.at[at].set(new[:, 0].astype(cache.dtype), unique_indices=True)

        return DenseState(write(state.keys, key), write(state.values, value), state.tokens)

    def attend(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        state: DenseState,
        seen: Bool[Array, "batch kv_heads_or_1 tokens"],
    ) -> Float[Array, "batch 1 heads head_dim"]:
        """Attention to the tokens seen, in one layer; softmax in float32."""
        logits = jnp.where(seen[:, :, None, :], self.logits(layer, query, state), MASKED)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        values = state.values[layer].astype(jnp.float32)
        output = jnp.einsum("bhgs,bhsd->bhgd", weights, values)
        return output.astype(query.dtype).reshape(query.shape)

    def logits(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        state: DenseState,
    ) -> Float[Array, "batch kv_heads group tokens"]:
        """Scaled products of query and keys in one layer, float32, for all the room there is."""
        batch, _, heads, head_dim = query.shape
        keys = state.keys[layer]
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        products = jnp.einsum("bhgd,bhsd->bhgs", grouped, keys, preferred_element_type=jnp.float32)
        return products / math.sqrt(head_dim)

    def grow(self, state: DenseState) -> DenseState:
        """Nothing to do: see `WaveAttention.grow`."""
        return state

    def advance(self, state: DenseState, active: Bool[Array, " batch"]) -> DenseState:
        """Counts the step's tokens in; a sequence that is not active forgets its token."""
        return dataclasses.replace(state, tokens=state.tokens + active.astype(jnp.int32))
