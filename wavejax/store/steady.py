"""The steady zone: the KV rows that are always attended to exactly."""

from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from wavejax._pytree import state
from wavejax.config import WaveConfig
from wavejax.store.shape import ROW, STACK, CacheShape


@state
class SteadyZone:
    """The KV rows that are always attended to exactly, on the device, by position.

    Attributes:
        sink: `[layers, batch, kv_heads, sink_tokens, 2, head_dim]`, the first tokens.
        sink_tokens: `[batch]` int32, how many there are.
        window: `[layers, batch, kv_heads, window, 2, head_dim]`, the tokens after the indexed
            ones, oldest first.
        window_tokens: `[batch]` int32, how many there are.
    """

    sink: Array
    sink_tokens: Array
    window: Array
    window_tokens: Array

    AXES: ClassVar = {
        "sink": (*STACK, "sinks", *ROW),
        "sink_tokens": ("sequences",),
        "window": (*STACK, "window", *ROW),
        "window_tokens": ("sequences",),
    }


def init_steady(config: WaveConfig, shape: CacheShape, batch: int, dtype: DTypeLike) -> SteadyZone:
    """Make an empty steady zone, with room for the settings' sinks and window."""
    stack, row = shape.stack(batch), (2, shape.head_dim)
    return SteadyZone(
        sink=jnp.zeros((*stack, config.sink_tokens, *row), dtype),
        sink_tokens=jnp.zeros(batch, jnp.int32),
        window=jnp.zeros((*stack, config.window_tokens, *row), dtype),
        window_tokens=jnp.zeros(batch, jnp.int32),
    )


def fill_steady(
    steady: SteadyZone,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    rows: Float[Array, "kv_heads tokens 2 head_dim"],
    window_start: Int[Array, ""],
) -> SteadyZone:
    """Write a prompt's sinks, and its KV rows from `window_start` on, in one layer.

    Args:
        steady: before this layer. Its numbers of tokens stay as they are.
        layer: int32, which layer.
        sequence: int32, whose zone to write.
        rows: the prompt's KV rows, by position; anything past the prompt's length.
        window_start: int32, the position of the first token in the window.
    """
    sinks, window = steady.sink.shape[3], steady.window.shape[3]
    padded = jnp.pad(rows, ((0, 0), (0, max(sinks, window)), (0, 0), (0, 0)))
    tail = lax.dynamic_slice_in_dim(padded, window_start, window, axis=1)
    dtype = steady.sink.dtype
    return SteadyZone(
        sink=steady.sink.at[layer, sequence].set(padded[:, :sinks].astype(dtype)),
        sink_tokens=steady.sink_tokens,
        window=steady.window.at[layer, sequence].set(tail.astype(dtype)),
        window_tokens=steady.window_tokens,
    )


def push_rows(
    steady: SteadyZone,
    layer: Int[Array, ""] | int,
    rows: Float[Array, "batch kv_heads 2 head_dim"],
) -> SteadyZone:
    """Write each sequence's newest KV row at its window's end. Does not move `window_tokens`."""
    batch, kv_heads = rows.shape[:2]
    b, h = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :]
    window = steady.window.at[layer, b, h, steady.window_tokens[:, None]].set(
        rows.astype(steady.window.dtype)
    )
    return SteadyZone(steady.sink, steady.sink_tokens, window, steady.window_tokens)
