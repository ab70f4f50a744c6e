"""One layer over a prompt in parts: blocks of its tokens, so that none takes long.

Three kinds, in this order: `enter` makes blocks' keys and values, `attend` blocks' outputs, `write`
the layer's cache. The layer's output is what `compiled.prefill_layer` gives, but for rounding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from models import decoder
from models.config import ModelConfig
from models.parameters import Params
from wavejax.attention.causal_block import attend_block
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine.interface import Number
from wavejax.engine.staged_state import StagedState


@functools.partial(jax.jit, static_argnums=0)
def buffers(model_config: ModelConfig, hidden: Array) -> tuple[Array, Array, Array]:
    """Room for a layer's keys and values, heads first, and for its output."""
    shape = (model_config.num_kv_heads, hidden.shape[1], model_config.head_dim)
    return jnp.zeros(shape, hidden.dtype), jnp.zeros(shape, hidden.dtype), jnp.zeros_like(hidden)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("key", "value"))
def enter(
    model_config: ModelConfig,
    block: int,
    params: Params,
    layer: Array,
    hidden: Array,
    key: Array,
    value: Array,
    first: Array,
    count: Array,
) -> tuple[Array, Array]:
    """Make the keys and values of `count` blocks, from block `first` on."""
    weights = decoder.pick_layer(params, layer)

    def one(number: Array, made: tuple[Array, Array]) -> tuple[Array, Array]:
        part, positions = _block(hidden, number, block)
        _, *new = decoder.enter_layer(model_config, weights, layer, part, positions)
        start = (jnp.int32(0), number * block, jnp.int32(0))
        key, value = (
            lax.dynamic_update_slice(old, jnp.swapaxes(x[0], 0, 1).astype(old.dtype), start)
            for old, x in zip(made, new, strict=True)
        )
        return key, value

    return lax.fori_loop(first, first + count, one, (key, value))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="output")
def attend(
    model_config: ModelConfig,
    block: int,
    params: Params,
    layer: Array,
    hidden: Array,
    key: Array,
    value: Array,
    output: Array,
    first: Array,
    count: Array,
) -> Array:
    """Make the layer's output of `count` blocks, from block `first` on: attention and MLP."""
    weights = decoder.pick_layer(params, layer)
    scale = 1.0 / math.sqrt(model_config.head_dim)

    def one(number: Array, output: Array) -> Array:
        part, positions = _block(hidden, number, block)
        query, _, _ = decoder.enter_layer(model_config, weights, layer, part, positions)
        attended = attend_block(query[0], key, value, number, scale=scale)
        left = decoder.leave_layer(model_config, weights, part, attended[None])
        start = (jnp.int32(0), number * block, jnp.int32(0))
        return lax.dynamic_update_slice(output, left, start)

    return lax.fori_loop(first, first + count, one, output)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="attention_state")
def write(
    attention: AnyAttention,
    layer: Array,
    key: Array,
    value: Array,
    sequence: Array,
    length: Array,
    attention_state: Any,
) -> Any:
    """Write the layer's cache of the whole prompt."""
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    return attention.write_prompt(
        layer, key, value, attention_state, sequence=sequence, length=length
    )


def _block(hidden: Array, number: Array, block: int) -> tuple[Array, Array]:
    """Cut out a block's rows of the layer's input, and number their positions."""
    part = lax.dynamic_slice_in_dim(hidden, number * block, block, axis=1)
    return part, (number * block + jnp.arange(block, dtype=jnp.int32))[None]


@functools.partial(jax.jit, static_argnums=0, donate_argnames="attention_state")
def write_staged(
    attention: WaveAttention,
    layer: Array,
    key: Array,
    value: Array,
    sequence: Array,
    length: Array,
    attention_state: Any,
) -> tuple[Array, Any]:
    """As `write`, but returns the rows that the host is to hold, and the rest of the state."""
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    return attention.index_prompt(
        layer, key, value, attention_state, sequence=sequence, length=length
    )


def write_layer(
    attention: Any,
    layer: Number,
    key: Array,
    value: Array,
    sequence: Number,
    length: Number,
    attention_state: Any,
) -> Any:
    """Write the layer's cache, wherever the rows are; `attention_state` as the engine holds it."""
    given = layer, key, value, sequence, length
    if not isinstance(attention_state, StagedState):
        return write(attention, *given, attention_state)
    rows, on_device = write_staged(attention, *given, attention_state.on_device)
    stored = attention_state.rows
    stored.put((int(layer), int(sequence), slice(None), slice(0, rows.shape[1])), rows)
    return StagedState(on_device, stored)
