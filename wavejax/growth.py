"""Growth: a full window's oldest tokens become a segment of the index."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

import pallas_kernels as ops
from wavejax import index
from wavejax.buffer import RowStore
from wavejax.config import WaveConfig
from wavejax.wave_state import WaveState


def grow(config: WaveConfig, state: WaveState, due: Bool[Array, " batch"]) -> WaveState:
    """Moves the oldest `growth_tokens` of each due sequence's window into its index and store.

    A store without room for a single row stays as it is: the rows are then the caller's to keep.
    """
    growth, local = config.growth_tokens, config.local_tokens
    layers, batch = state.steady.window.shape[:2]
    stored = state.store.rows.shape[3] > 0

    def grow_one(state: WaveState, layer: Array, sequence: Array) -> WaveState:
        window = state.steady.window[layer, sequence]
        start = state.index.tokens[sequence]
        oldest = window[:, :growth]
        new_index = index.append_segments(
            state.index,
            config,
            layer,
            sequence,
            start,
            oldest[None, :, :, 0],
            oldest[None, :, :, 1],
            jnp.full(1, growth, jnp.int32),
        )
        store = state.store
        if stored:
            store = RowStore(ops.append_rows(store.rows, oldest, layer, sequence, start))
        kept = state.steady.window.at[layer, sequence, :, :local].set(window[:, growth:])
        return dataclasses.replace(
            state,
            index=new_index,
            store=store,
            steady=dataclasses.replace(state.steady, window=kept),
        )

    def visit(i: Array, state: WaveState) -> WaveState:
        layer, sequence = i // batch, i % batch
        return lax.cond(due[sequence], lambda s: grow_one(s, layer, sequence), lambda s: s, state)

    state = lax.fori_loop(0, layers * batch, visit, state)
    tokens = state.index.tokens + jnp.where(due, growth, 0)
    window = state.steady.window_tokens - jnp.where(due, growth, 0)
    return dataclasses.replace(
        state,
        index=dataclasses.replace(state.index, tokens=tokens),
        steady=dataclasses.replace(state.steady, window_tokens=window),
    )
