"""More tokens of a sequence that was read: exact attention to all that it holds, and to themselves.

As a prompt's, but that earlier keys and values are the state's. The new ones go where a decode step
puts its token: wave attention's into the window, which grows into the index as it fills.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Num

import pallas_kernels as ops
from pallas_kernels import KeptRows, Rows
from pallas_kernels.attend_appended import has_kernel
from pallas_kernels.rounding import held_as
from wavejax.attention.appended_attention import attend, stored_dense, stored_wave
from wavejax.attention.dense import DenseState
from wavejax.attention.protocol import AnyAttention, Layer, PromptKV, PromptQuery, scale_of
from wavejax.attention.wave import WaveAttention
from wavejax.store.rows import as_rows

TILE = 128  # Rows of a matrix product's tile, on a GPU.
# New tokens up to which the op that reads rows where they lie is sooner than cuDNN: 237 us for
# 782 at 32, as fast at 128, 6.8 ms for 4.3 at 1,024 (Llama-3-8B's heads, 122,880 tokens, an H200).
MOST_TOKENS = 128


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


def cut(state: Any, sequence: Int[Array, ""] | int, tokens: Int[Array, ""] | int) -> Any:
    """Leave a sequence no more than its first tokens: `fewest_tokens` at least."""
    if isinstance(state, DenseState):
        return dataclasses.replace(state, tokens=_left(state.tokens, sequence, tokens))
    steady = state.steady
    before = steady.sink_tokens, state.index.tokens
    counts = _left(steady.window_tokens, sequence, tokens, before)
    return dataclasses.replace(state, steady=dataclasses.replace(steady, window_tokens=counts))


@jax.jit
def _left(counts: Array, sequence: Array, tokens: Array, before: tuple[Array, ...] = ()) -> Array:
    """Set a sequence's count to what is left of `tokens` after other counts of it.

    A program of the counts alone: it takes a host 1 ms to call one with the whole state.
    """
    return counts.at[sequence].set(tokens - sum(count[sequence] for count in before))


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
    _, tokens, heads, head_dim = query.shape
    grouped = query.reshape(tokens, new.shape[0], heads // new.shape[0], head_dim)
    if stored is None and _reads_where_they_lie(grouped, state):
        state = _write(state, layer, sequence, new, count)
        own, *others = _kept(state)
        given = grouped, own, others, count, sequence, layer
        output = ops.attend_appended(*given, scale=scale_of(query))
        return output.reshape(query.shape), state
    place = jnp.arange(tokens)
    causal = (place <= place[:, None]) & (place < count)
    if isinstance(state, DenseState):
        before, rows, seen = stored_dense(state, layer, sequence), new, causal
    else:
        before, steady = stored_wave(state, layer, sequence, stored), state.steady
        sinks, window = steady.sink[layer, sequence], steady.window[layer, sequence]
        # In whole tiles of a product, or XLA pads rows and weights by kernels of their own.
        beside = sinks.shape[1] + window.shape[1] + tokens
        filler = jnp.zeros((new.shape[0], -beside % TILE, *new.shape[2:]), window.dtype)
        rows = jnp.concatenate([sinks, window, new.astype(window.dtype), filler], axis=1)
        valid = [
            jnp.arange(sinks.shape[1]) < steady.sink_tokens[sequence],
            jnp.arange(window.shape[1]) < steady.window_tokens[sequence],
        ]
        held = jnp.broadcast_to(jnp.concatenate(valid), (tokens, sinks.shape[1] + window.shape[1]))
        unseen = jnp.zeros((tokens, filler.shape[1]), bool)
        seen = jnp.concatenate([held, causal, unseen], axis=1)
    output = attend(query, rows, seen, before)
    return output, _write(state, layer, sequence, new, count)


def _reads_where_they_lie(query: Array, state: Any) -> bool:
    """Whether the op that reads rows where they are attends, by its kernel.

    Args:
        query: `[tokens, kv_heads, group, head_dim]`.
        state: before the new rows are written.
    """
    own, *others = _kept(state)
    host = jax.memory.Space.Host
    on_host = any(jax.typeof(x).memory_space == host for x in jax.tree.leaves((own, others)))
    return not on_host and query.shape[0] <= MOST_TOKENS and has_kernel(query, own, others)


def _kept(state: Any) -> tuple[KeptRows, ...]:
    """Give what the sequences hold: first what new tokens are written to."""
    if isinstance(state, DenseState):
        return (KeptRows(state.keys, state.values, state.tokens),)
    steady, index = state.steady, state.index
    return (
        KeptRows(Rows(steady.window), None, steady.window_tokens),
        KeptRows(Rows(steady.sink), None, steady.sink_tokens),
        KeptRows(state.store.rows, None, index.tokens),
    )


def advance(state: Any, sequence: Int[Array, ""], count: Int[Array, ""]) -> Any:
    """Count appended tokens in, after the last layer."""
    if isinstance(state, DenseState):
        return dataclasses.replace(state, tokens=state.tokens.at[sequence].add(count))
    window = state.steady.window_tokens.at[sequence].add(count)
    return dataclasses.replace(
        state, steady=dataclasses.replace(state.steady, window_tokens=window)
    )


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
