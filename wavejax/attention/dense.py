"""Full attention: the answer to compare with."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from pallas_kernels import Implementation
from pallas_kernels.types import MASKED
from wavejax._pytree import state as pytree
from wavejax.attention.implementation import by_own_implementation, check_implementation
from wavejax.attention.protocol import (
    Attention,
    Layer,
    PromptTokenKV,
    StepKV,
    StepQuery,
    scale_of,
)
from wavejax.store.shape import STACK, CacheShape


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

    AXES: ClassVar = {
        "keys": (*STACK, "tokens", "head_dim"),
        "values": (*STACK, "tokens", "head_dim"),
        "tokens": ("sequences",),
    }


@dataclasses.dataclass(frozen=True)
class DenseAttention(Attention[DenseState]):
    """Full attention: every token is attended to exactly, its key and value on the device.

    Attributes:
        implementation: how its op runs, as of `WaveAttention`.

    Raises:
        InputError: there is no such implementation.
    """

    implementation: Implementation | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_implementation(self.implementation)

    def init_state(
        self,
        shape: CacheShape,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: DTypeLike,
        *,
        shortest_prompt: int = 1,
    ) -> DenseState:
        room = prompt_tokens + new_tokens
        size = (*shape.stack(batch), room, shape.head_dim)
        # Two arrays, not one twice: a buffer cannot be donated twice.
        keys, values = jnp.zeros(size, dtype), jnp.zeros(size, dtype)
        return DenseState(keys, values, jnp.zeros(batch, jnp.int32))

    @property
    def state_type(self) -> type[DenseState]:
        return DenseState

    def lengths(self, state: DenseState) -> Int[Array, " batch"]:
        return state.tokens

    def remaining(self, state: DenseState) -> Int[Array, " batch"]:
        return state.keys.shape[3] - state.tokens

    def write_prompt(
        self,
        layer: Layer,
        key: PromptTokenKV,
        value: PromptTokenKV,
        state: DenseState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> DenseState:
        del length  # What lies past it is overwritten before it is ever attended to.

        def write(cache: Array, new: Array) -> Array:
            block = jnp.swapaxes(new, 0, 1)[None, None].astype(cache.dtype)
            # Of the same type also where Python's numbers are of 64 bits.
            start = (jnp.asarray(i, jnp.int32) for i in (layer, sequence, 0, 0, 0))
            return lax.dynamic_update_slice(cache, block, tuple(start))

        return DenseState(write(state.keys, key), write(state.values, value), state.tokens)

    def finish_prefill(
        self, state: DenseState, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> DenseState:
        return dataclasses.replace(state, tokens=state.tokens.at[sequence].set(length))

    @by_own_implementation
    def decode(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: DenseState
    ) -> tuple[StepQuery, DenseState]:
        state = self.append(layer, key, value, state)
        batch, _, heads, head_dim = query.shape
        kv_heads = key.shape[2]
        output, _ = ops.attend_dense(
            query.reshape(batch, kv_heads, heads // kv_heads, head_dim),
            state.keys,
            state.values,
            state.tokens + 1,
            layer,
            scale=scale_of(query),
        )
        return output.astype(query.dtype).reshape(query.shape), state

    def advance(self, state: DenseState, active: Bool[Array, " batch"]) -> DenseState:
        return dataclasses.replace(state, tokens=state.tokens + active.astype(jnp.int32))

    def append(self, layer: Layer, key: StepKV, value: StepKV, state: DenseState) -> DenseState:
        """Write a step's keys and values in one layer. Does not move `tokens`."""
        batch, _, kv_heads, _ = key.shape
        b, h = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :]
        at = (layer, b, h, state.tokens[:, None])

        def write(cache: Array, new: Array) -> Array:
            return cache.at[at].set(new[:, 0].astype(cache.dtype), unique_indices=True)

        return DenseState(write(state.keys, key), write(state.values, value), state.tokens)

    def attend(
        self,
        layer: Layer,
        query: StepQuery,
        state: DenseState,
        seen: Bool[Array, "batch kv_heads_or_1 tokens"],
    ) -> StepQuery:
        """Attend to the tokens seen, in one layer; softmax in float32."""
        logits = jnp.where(seen[:, :, None, :], self.logits(layer, query, state), MASKED)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # A weight of zero does not keep out a value that is not finite.
        values = jnp.where(seen[..., None], state.values[layer], 0).astype(jnp.float32)
        output = jnp.einsum("bhgs,bhsd->bhgd", weights, values)
        return output.astype(query.dtype).reshape(query.shape)

    def logits(
        self, layer: Layer, query: StepQuery, state: DenseState
    ) -> Float[Array, "batch kv_heads group tokens"]:
        """Multiply query and keys in one layer, scaled, float32, for all the room there is."""
        batch, _, heads, head_dim = query.shape
        keys = state.keys[layer]
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        products = jnp.einsum("bhgd,bhsd->bhgs", grouped, keys, preferred_element_type=jnp.float32)
        return products / math.sqrt(head_dim)
