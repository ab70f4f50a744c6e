"""More tokens of a sequence that was read: exact attention to all that it holds, and to themselves.

As a prompt's, but that earlier keys and values are the state's. The new ones go where a decode step
puts its token: wave attention's into the window, which grows into the index as it fills.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Num

from pallas_kernels import _compat
from pallas_kernels.rounding import dequantise, held_as
from pallas_kernels.types import MASKED, Rows
from wavejax.attention.dense import DenseState
from wavejax.attention.protocol import AnyAttention, Layer, PromptKV, PromptQuery, scale_of
from wavejax.attention.wave import WaveAttention
from wavejax.store.rows import as_rows
from wavejax.store.state import WaveState

BLOCK = 2048  # Stored rows attended to at a time: bounds what logits take.

Running = tuple[Array, Array, Array]  # The largest logit so far, the weights' sum, the output.
ReadBlock = Callable[[Array], Float[Array, "kv_heads block 2 head_dim"]]


def free_tokens(attention: AnyAttention, state: Any) -> Int[Array, " batch"]:
    """Count the tokens that may be appended before the state has to grow: int32."""
    if isinstance(attention, WaveAttention):
        return attention.config.window_tokens - state.steady.window_tokens
    return attention.remaining(state)


def fewest_tokens(attention: AnyAttention, state: Any) -> Int[Array, " batch"]:
    """Count the tokens that `cut` must leave of each sequence, also after one step more: int32.

    Wave attention's sinks and index stay as they are, and a full window is about to grow.
    """
    if isinstance(attention, WaveAttention):
        growth = attention.config.growth_tokens * attention.due(state)
        return state.steady.sink_tokens + state.index.tokens + growth
    return jnp.zeros_like(attention.lengths(state))


def cut(state: Any, sequence: Int[Array, ""], tokens: Int[Array, ""]) -> Any:
    """Leave a sequence no more than its first tokens: `fewest_tokens` at least."""
    if isinstance(state, DenseState):
        return dataclasses.replace(state, tokens=state.tokens.at[sequence].set(tokens))
    steady = state.steady
    window = tokens - steady.sink_tokens[sequence] - state.index.tokens[sequence]
    counts = steady.window_tokens.at[sequence].set(window)
    return dataclasses.replace(state, steady=dataclasses.replace(steady, window_tokens=counts))


def append(
    layer: Layer,
    query: PromptQuery,
    key: PromptKV,
    value: PromptKV,
    state: Any,
    *,
    sequence: Int[Array, ""],
    count: Int[Array, ""],
    stored: Num[Array, "kv_heads stored 2 head_dim"] | None = None,
) -> tuple[PromptQuery, Any]:
    """Attend exactly, and write the new keys and values, in one layer. Moves no length.

    Args:
        layer: int32, which layer.
        query, key, value: the new tokens', after RoPE at their positions, padded past `count`.
        state: of `WaveAttention` or `DenseAttention`, before this layer.
        sequence: int32, whose tokens they are.
        count: int32, how many: no more than `free_tokens`.
        stored: the sequence's row store in this layer, where the state has none (staged rows).

    Returns:
        the layer's output, anything past `count`, and the state.
    """
    new = jnp.swapaxes(as_rows(key[0], value[0]), 0, 1)
    tokens = new.shape[1]
    place = jnp.arange(tokens)
    causal = (place <= place[:, None]) & (place < count)
    if isinstance(state, DenseState):
        read, room = _read_dense(state, layer, sequence), state.keys.shape[3]
        indexed, rows, seen = state.tokens[sequence], new, causal
    else:
        read, room = _read_store(state, layer, sequence, stored)
        steady, indexed = state.steady, state.index.tokens[sequence]
        sinks, window = steady.sink[layer, sequence], steady.window[layer, sequence]
        rows = jnp.concatenate([sinks, window, new.astype(window.dtype)], axis=1)
        valid = [
            jnp.arange(sinks.shape[1]) < steady.sink_tokens[sequence],
            jnp.arange(window.shape[1]) < steady.window_tokens[sequence],
        ]
        held = jnp.broadcast_to(jnp.concatenate(valid), (tokens, sinks.shape[1] + window.shape[1]))
        seen = jnp.concatenate([held, causal], axis=1)
    output = _attend(query, rows, seen, read, indexed, room)
    return output, _write(state, layer, sequence, new, count)


def advance(state: Any, sequence: Int[Array, ""], count: Int[Array, ""]) -> Any:
    """Count appended tokens in, after the last layer."""
    if isinstance(state, DenseState):
        return dataclasses.replace(state, tokens=state.tokens.at[sequence].add(count))
    window = state.steady.window_tokens.at[sequence].add(count)
    return dataclasses.replace(
        state, steady=dataclasses.replace(state.steady, window_tokens=window)
    )


def _attend(
    query: PromptQuery,
    rows: Float[Array, "kv_heads rows 2 head_dim"],
    seen: Bool[Array, "tokens rows"],
    read: ReadBlock,
    indexed: Int[Array, ""],
    room: int,
) -> PromptQuery:
    """Softmax over rows at hand and `indexed` stored ones, block by block, in float32."""
    _, tokens, heads, head_dim = query.shape
    kv_heads, scale = rows.shape[0], scale_of(query)
    grouped = query[0].reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(1, 2, 0, 3)

    def take_in(running: Running, rows: Array, seen: Array) -> Running:
        peak, total, output = running
        # A row that is not seen may hold anything, NaN included.
        rows = jnp.where(jnp.any(seen, axis=0)[:, None, None], rows, 0)
        logits = scale * jnp.einsum(
            "hgtd,hnd->hgtn", grouped, rows[..., 0, :], preferred_element_type=jnp.float32
        )
        logits = jnp.where(seen, logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None]), 0.0)
        kept = jnp.exp(peak - new_peak)
        values = rows[..., 1, :]
        added = jnp.einsum(
            "hgtn,hnd->hgtd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        total = total * kept + jnp.sum(weights, axis=-1)
        return new_peak, total, output * kept[..., None] + added

    shape = grouped.shape[:3]
    nothing = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32)
    running = take_in(nothing, rows, seen)
    block = min(BLOCK, room)
    if block:

        def round_of(i: Array, running: Running) -> Running:
            # The last block is moved back into the room, and what was seen of it masked.
            start = jnp.minimum(i * block, room - block)
            place = start + jnp.arange(block)
            seen = (place >= i * block) & (place < indexed)
            return take_in(running, read(start), jnp.broadcast_to(seen, (tokens, block)))

        running = lax.fori_loop(0, (indexed + block - 1) // block, round_of, running)
    _, total, output = running
    output = output / jnp.where(total > 0, total, 1.0)[..., None]
    output = output.transpose(2, 0, 1, 3).reshape(query.shape)
    return output.astype(query.dtype)


def _read_dense(state: DenseState, layer: Array, sequence: Array) -> ReadBlock:
    block = min(BLOCK, state.keys.shape[3])

    def cut(array: Array, start: Array) -> Array:
        rest = array.shape[4:]
        where = (layer, sequence, jnp.int32(0), start, *(jnp.int32(0) for _ in rest))
        return lax.dynamic_slice(array, where, (1, 1, array.shape[2], block, *rest))[0, 0]

    def read(start: Array) -> Array:
        rows = (state.keys, state.values)
        return as_rows(*(dequantise(jax.tree.map(lambda x: cut(x, start), each)) for each in rows))

    return read


def _read_store(
    state: WaveState, layer: Array, sequence: Array, stored: Array | None
) -> tuple[ReadBlock, int]:
    """Make what reads a block of the row store, wherever it is; give the store's room too."""
    rows, scales = state.store.rows
    kv_heads, room = rows.shape[2], rows.shape[3] if stored is None else stored.shape[1]
    block = min(BLOCK, room)

    def of_scales(start: Array) -> Array | None:
        if scales is None:
            return None
        where = (layer, sequence, jnp.int32(0), start, jnp.int32(0))
        return lax.dynamic_slice(scales, where, (1, 1, kv_heads, block, 2))[0, 0]

    if stored is not None:

        def read_staged(start: Array) -> Array:
            levels = lax.dynamic_slice_in_dim(stored, start, block, axis=1)
            return dequantise(Rows(levels, of_scales(start)))

        return read_staged, room
    sizes = (1, 1, kv_heads, block, *rows.shape[4:])

    def cut(rows: Array, where: Array) -> Array:
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(0, 1, 2, 3), collapsed_slice_dims=(0, 1), start_index_map=(0, 1, 3)
        )
        return lax.gather(rows, where, numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    def read(start: Array) -> Array:
        return dequantise(Rows(read_data(start), of_scales(start)))

    def read_data(start: Array) -> Array:
        where = jnp.stack([layer, sequence, start]).astype(jnp.int32)
        if jax.typeof(rows).memory_space != jax.memory.Space.Host:
            return cut(rows, where)
        # XLA does not gather across memories: the host's processor does, and one transfer follows.
        where = jax.device_put(where, jax.memory.Space.Host)
        return jax.device_put(_compat.run_on_host(cut, rows, where), jax.memory.Space.Device)

    return read, room


def _write(state: Any, layer: Array, sequence: Array, new: Array, count: Array) -> Any:
    """Put new rows `[kv_heads, tokens, 2, head_dim]` after the sequence's last ones."""
    place = jnp.arange(new.shape[1], dtype=jnp.int32)
    by_token = jnp.swapaxes(new, 0, 1)

    def write(array: Array, rows: Array, first: Array, axis_room: int) -> Array:
        at = jnp.where(place < count, first + place, axis_room)
        return array.at[layer, sequence, :, at].set(rows.astype(array.dtype), mode="drop")

    if isinstance(state, DenseState):
        room = state.keys.shape[3]
        put = functools.partial(write, first=state.tokens[sequence], axis_room=room)
        keys, values = (
            jax.tree.map(put, rows, held_as(by_token[:, :, i], rows))
            for i, rows in enumerate((state.keys, state.values))
        )
        return dataclasses.replace(state, keys=keys, values=values)
    steady = state.steady
    window = write(steady.window, by_token, steady.window_tokens[sequence], steady.window.shape[3])
    return dataclasses.replace(state, steady=dataclasses.replace(steady, window=window))
