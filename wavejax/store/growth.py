"""Growth: a full window's oldest tokens become a segment of the index."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

from wavejax.config import WaveConfig
from wavejax.store import index
from wavejax.store.rows import append_rows
from wavejax.store.state import WaveState


def grow(config: WaveConfig, state: WaveState, due: Bool[Array, " batch"]) -> WaveState:
    """Move the oldest `growth_tokens` of each due sequence's window into its index and store.

    A store without room for a single KV row gets no rows: the caller then keeps them.
    By a loop that goes round for the sequences that are due, mostly not once: for a `lax.cond` XLA
    would copy the whole state, every step.
    """
    growth, local = config.growth_tokens, config.local_tokens
    layers = state.steady.window.shape[0]

    sequences = jnp.argsort(~due)  # those that are due come first
    count = jnp.sum(due, dtype=jnp.int32)

    def grow_one(i: Array, state: WaveState) -> WaveState:
        layer, sequence = i // count, sequences[i % count]
        # Read once, before anything is written: else XLA reads it again and again out of the
        # stack, and copies the stack in order to still have it when it has been written to.
        window = lax.optimization_barrier(state.steady.window[layer, sequence])
        start = state.index.tokens[sequence]
        oldest = window[:, :growth]
        new_index = index.append_segments(
            state.index,
            config,
            layer,
            sequence,
            start,
            oldest[None],
            jnp.full(1, growth, jnp.int32),
            start + growth,
        )
        store = append_rows(state.store, oldest, layer, sequence, start)
        kept = state.steady.window.at[layer, sequence, :, :local].set(window[:, growth:])
        return dataclasses.replace(
            state,
            index=new_index,
            store=store,
            steady=dataclasses.replace(state.steady, window=kept),
        )

    state = lax.fori_loop(0, layers * count, grow_one, state)
    tokens = state.index.tokens + jnp.where(due, growth, 0)
    window = state.steady.window_tokens - jnp.where(due, growth, 0)
    return dataclasses.replace(
        state,
        index=dataclasses.replace(state.index, tokens=tokens),
        steady=dataclasses.replace(state.steady, window_tokens=window),
    )
