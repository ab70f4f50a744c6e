"""A prompt enters the state: sinks and window, index, and row store."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from wavejax.config import WaveConfig
from wavejax.store.index import append_prompt, clear
from wavejax.store.rows import append_rows, as_rows, forget, held_on_host
from wavejax.store.sizes import segment_sizes
from wavejax.store.state import WaveState
from wavejax.store.steady import fill_steady


def write_prompt(
    config: WaveConfig,
    layer: Int[Array, ""],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    state: WaveState,
    sequence: Int[Array, ""],
    length: Int[Array, ""],
) -> WaveState:
    """Write a prompt into one layer: its steady zone, index and row store. Moves no length.

    Args:
        config: the settings.
        layer: int32, which layer.
        key, value: the prompt's, by position, after RoPE; anything past `length`.
        state: before this layer.
        sequence: int32, whose state to write.
        length: int32, the prompt's tokens.
    """
    rows, state = index_prompt(config, layer, key, value, state, sequence, length)
    if not rows.shape[1]:
        return state
    store = append_rows(state.store, rows, layer, sequence, 0)
    return dataclasses.replace(state, store=store)


def write_staged(
    config: WaveConfig,
    layer: Int[Array, ""],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    state: WaveState,
    sequence: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[Num[Array, "kv_heads indexed 2 head_dim"], WaveState]:
    """Write a prompt into one layer, but for rows that the host is to hold: see `write_prompt`.

    Returns:
        these rows, from the first one on, padding included, as `held_on_host` makes them; and the
        state, with their scales if they have any.
    """
    rows, state = index_prompt(config, layer, key, value, state, sequence, length)
    store = append_rows(state.store, rows, layer, sequence, 0)
    return held_on_host(rows, store.rows.dtype), dataclasses.replace(state, store=store)


def index_prompt(
    config: WaveConfig,
    layer: Int[Array, ""],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    state: WaveState,
    sequence: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[Float[Array, "kv_heads indexed 2 head_dim"], WaveState]:
    """Write a prompt into one layer, but for its row store: see `write_prompt`.

    Returns:
        the KV rows that the row store is to hold from its first one on, padding included; and the
        state.
    """
    rows = jnp.swapaxes(as_rows(key, value), 0, 1)  # By position.
    sinks, indexed = config.sink_tokens, indexed_tokens(config, length)
    window_start = jnp.minimum(length, sinks) + indexed
    steady = fill_steady(state.steady, layer, sequence, rows, window_start)
    room = sum(segment_sizes(config, config.indexed_tokens(rows.shape[1])))
    padding = max(0, sinks + room - rows.shape[1])
    # By store row: the position less the sinks.
    rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0), (0, 0)))[:, sinks : sinks + room]
    index = clear(state.index, layer, sequence)
    index = append_prompt(index, config, layer, sequence, rows, indexed)
    return rows, dataclasses.replace(state, index=index, steady=steady)


def finish_prompt(
    config: WaveConfig, state: WaveState, sequence: Int[Array, ""], length: Int[Array, ""]
) -> WaveState:
    """Set a sequence's lengths after all layers have been written, and empty its slots.

    Args:
        config: the settings.
        state: after the last layer's `write_prompt`.
        sequence: int32, whose.
        length: int32, the prompt's tokens.
    """
    indexed = indexed_tokens(config, length)
    sinks = jnp.minimum(length, config.sink_tokens)
    steady, index = state.steady, state.index
    return dataclasses.replace(
        state,
        index=dataclasses.replace(
            index,
            tokens=index.tokens.at[sequence].set(indexed),
            prompt_tokens=index.prompt_tokens.at[sequence].set(indexed),
        ),
        cache=forget(state.cache, sequence),
        steady=dataclasses.replace(
            steady,
            sink_tokens=steady.sink_tokens.at[sequence].set(sinks),
            window_tokens=steady.window_tokens.at[sequence].set(length - sinks - indexed),
        ),
        attended=state.attended.at[sequence].set(0.0),
    )


def indexed_tokens(config: WaveConfig, length: Int[Array, ""]) -> Int[Array, ""]:
    """`WaveConfig.indexed_tokens` of a length known only when the program runs."""
    rest = length - config.sink_tokens
    return jnp.where(rest < config.window_tokens, 0, rest - config.local_tokens)
