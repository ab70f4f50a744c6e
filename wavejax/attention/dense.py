"""Full attention: the answer to compare with."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from pallas_kernels import Implementation
from pallas_kernels.append_rows.reference import write
from pallas_kernels.rounding import dequantise, held_as
from pallas_kernels.types import MASKED, Rows
from wavejax._pytree import state as pytree
from wavejax.attention.footprint import Footprint, with_levels
from wavejax.attention.implementation import by_own_implementation, check_implementation
from wavejax.attention.protocol import (
    Attention,
    Layer,
    PromptTokenKV,
    StepKV,
    StepQuery,
    scale_of,
)
from wavejax.config import ROW_DTYPES, check_known
from wavejax.store.rows import dtype_of, init_rows
from wavejax.store.shape import STACK, CacheShape

_AXES = {"data": (*STACK, "tokens", "head_dim"), "scales": (*STACK, "tokens")}


@pytree
class DenseState:
    """The KV cache of all layers and sequences.

    Attributes:
        keys, values: `[layers, batch, kv_heads, tokens, head_dim]`, with their format: of "scaled"
            ones levels, and scales `[layers, batch, kv_heads, tokens]`.
        tokens: `[batch]` int32, how many tokens each sequence holds.
    """

    keys: Rows
    values: Rows
    tokens: Array

    AXES: ClassVar = {"keys": _AXES, "values": _AXES, "tokens": ("sequences",)}


@dataclasses.dataclass(frozen=True)
class DenseAttention(Attention[DenseState]):
    """Full attention: every token is attended to exactly, its key and value on the device.

    Attributes:
        implementation: how its op runs, as of `WaveAttention`.
        row_dtype: what keys and values are kept in, of all tokens: "model", the model's own dtype;
            "int8", rounded as they are written, with a scale for each key and each value. A prompt,
            and what is appended, attends to its own tokens before they are rounded.

    Raises:
        InputError: there is no such implementation, or no such dtype.
    """

    implementation: Implementation | None = dataclasses.field(default=None, kw_only=True)
    row_dtype: str = dataclasses.field(default="model", kw_only=True)

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        check_known("row_dtype", self.row_dtype, ROW_DTYPES)

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
        room, held = prompt_tokens + new_tokens, dtype_of(self.row_dtype, dtype)
        size = (*shape.stack(batch), room, shape.head_dim)
        # Two arrays, not one twice: a buffer cannot be donated twice.
        keys, values = init_rows(size, held), init_rows(size, held)
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

        def put(rows: Rows, new: Array) -> Rows:
            return jax.tree.map(
                # Rounded as they come, heads first as they are written: else XLA would turn floats.
                lambda cache, one: write(cache, jnp.swapaxes(one, 0, 1), layer, sequence, 0),
                rows,
                held_as(new, rows),
            )

        return DenseState(put(state.keys, key), put(state.values, value), state.tokens)

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

        def put(rows: Rows, new: Array) -> Rows:
            return jax.tree.map(
                lambda cache, one: cache.at[at].set(one.astype(cache.dtype), unique_indices=True),
                rows,
                held_as(new[:, 0], rows),
            )

        return DenseState(put(state.keys, key), put(state.values, value), state.tokens)

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
        values = dequantise(state.values.of_layer(layer))
        values = jnp.where(seen[..., None], values, 0).astype(jnp.float32)
        output = jnp.einsum("bhgs,bhsd->bhgd", weights, values)
        return output.astype(query.dtype).reshape(query.shape)

    def logits(
        self, layer: Layer, query: StepQuery, state: DenseState
    ) -> Float[Array, "batch kv_heads group tokens"]:
        """Multiply query and keys in one layer, scaled, float32, for all the room there is."""
        batch, _, heads, head_dim = query.shape
        keys = dequantise(state.keys.of_layer(layer))
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        products = jnp.einsum("bhgd,bhsd->bhgs", grouped, keys, preferred_element_type=jnp.float32)
        return products / math.sqrt(head_dim)

    def footprint(
        self, state: DenseState, shape: CacheShape, heads: int, prompt_tokens: int, dtype: DTypeLike
    ) -> Footprint:
        found = super().footprint(state, shape, heads, prompt_tokens, dtype)
        if self.row_dtype == "model":
            return found
        return with_levels(found, (state.keys, state.values), shape, prompt_tokens)
