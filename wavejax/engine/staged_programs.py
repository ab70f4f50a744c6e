"""The compiled programs of a step whose rows are staged; see `wavejax.engine.staged`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels as ops
from models import decoder
from models.config import ModelConfig
from models.parameters import Params
from pallas_kernels.attend_zones.reference import admit, attend_rows, read_rows
from pallas_kernels.numerics import list_places
from pallas_kernels.rounding import dequantise
from pallas_kernels.types import NO_ID, Rows, ZoneStates
from wavejax.attention.causal import causal_attention
from wavejax.attention.implementation import implementation_of
from wavejax.attention.wave import WaveAttention, scale_of
from wavejax.engine import compiled
from wavejax.engine.interface import Engine
from wavejax.engine.state import DecodeState
from wavejax.store import growth
from wavejax.store.rows import RowStore, held_on_host, init_store
from wavejax.store.state import Selection, WaveState


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def prefill_layer(
    model_config: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    length: Array,
    state: WaveState,
) -> tuple[Array, tuple[WaveState, Array]]:
    """Run one layer over a padded prompt; return its rows apart, for the host."""

    def attend_prompt(
        layer: Array, query: Array, key: Array, value: Array, state: WaveState
    ) -> tuple[Array, tuple[WaveState, Array]]:
        output = causal_attention(query[0], key[0], value[0], scale=scale_of(query))[None]
        where = {"sequence": sequence, "length": length}
        rows, state = attention.index_prompt(layer, key[0], value[0], state, **where)
        return output, (state, rows)

    positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    return decoder.apply_layer(model_config, params, layer, hidden, positions, attend_prompt, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def draw(engine: Engine, state: DecodeState) -> tuple[DecodeState, Array, Array]:
    """Draw the next tokens."""
    return compiled.draw(engine, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def enter_step(
    model_config: ModelConfig,
    attention: WaveAttention,
    params: Params,
    state: WaveState,
    tokens: Array,
) -> tuple[Array, Array]:
    """Look up the tokens' embeddings and positions."""
    return decoder.embed(model_config, params, tokens[:, None]), attention.lengths(state)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def select(
    model_config: ModelConfig,
    attention: WaveAttention,
    params: Params,
    layer: Array,
    hidden: Array,
    positions: Array,
    state: WaveState,
) -> tuple[Selection, Array, Array, WaveState]:
    """Return what to attend to, and of it the rows that the cache does not hold, side by side."""
    weights = decoder.pick_layer(params, layer)
    inputs = decoder.enter_layer(model_config, weights, layer, hidden, positions)
    selection, state = attention.select(layer, *inputs, state)
    missed = (selection.tokens != NO_ID) & ~selection.hit
    places = list_places(missed, missed.shape[-1])

    def of_missed(x: Array) -> Array:
        taken = jnp.take_along_axis(x, jnp.minimum(places, x.shape[-1] - 1), axis=-1)
        return jnp.where(places == NO_ID, NO_ID, taken)

    tokens, slots = of_missed(selection.tokens), of_missed(selection.slots)
    found = (jnp.where(selection.hit, x, NO_ID) for x in (selection.tokens, selection.slots))
    cached = dict(zip(("tokens", "slots"), found, strict=True))
    return selection._replace(**cached), tokens, slots, state


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def attend(
    attention: WaveAttention, layer: Array, selection: Selection, state: WaveState
) -> tuple[ZoneStates, WaveState]:
    """Attends to all that is on the device."""
    # Nothing is missed, so nothing is read of what stands for the store.
    window, cached = state.steady.window, state.cache.rows
    stands_for = RowStore(Rows(window))
    if cached.scales is not None:
        stands_for = init_store((*window.shape[:3], 1, *window.shape[4:]), cached.dtype, "device")
    stored = dataclasses.replace(state, store=stands_for)
    zones, stored = attention.attend(layer, selection, stored)
    state = dataclasses.replace(stored, store=state.store)
    # The cache is the state's; no array may come out twice, to be donated twice.
    return zones._replace(cache_rows=Rows(jnp.zeros(0, state.cache.rows.dtype))), state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("hidden", "state"))
def finish(
    model_config: ModelConfig,
    attention: WaveAttention,
    params: Params,
    layer: Array,
    hidden: Array,
    query: Array,
    zones: ZoneStates,
    tokens: Array,
    slots: Array,
    block: Array,
    state: WaveState,
) -> tuple[Array, WaveState]:
    """Attends to the missed rows, admits them to the cache, and ends the layer."""
    batch, width = block.shape[0], block.shape[2]
    tokens, slots = tokens[..., :width], slots[..., :width]
    scales = state.store.rows.scales
    rows = Rows(block, None if scales is None else read_rows(scales, layer, tokens))
    missed = attend_rows(query, dequantise(rows), tokens != NO_ID, scale=scale_of(query))
    parts = (
        jnp.concatenate([all_else, part[None]])
        for all_else, part in zip(zones[:2], missed, strict=True)
    )
    with implementation_of(attention):
        output, _ = ops.merge_states(*parts, dtype=query.dtype)
    cached = admit(state.cache.rows, rows, layer, slots)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, rows=cached))
    output = output.reshape(batch, 1, -1, query.shape[-1])
    return decoder.leave_layer(
        model_config, decoder.pick_layer(params, layer), hidden, output
    ), state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def leave_step(
    model_config: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    finished: Array,
    state: WaveState,
) -> tuple[Array, WaveState]:
    """End a step: count its tokens in, and make the logits."""
    state = attention.advance(state, ~finished)
    last = decoder.final_norm(model_config, params, hidden[:, 0])
    return decoder.unembed(model_config, params, last), state


due = jax.jit(WaveAttention.due, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def oldest(window: Array, sequence: Array, size: int, dtype: np.dtype) -> Array:
    """Return the rows that leave a sequence's window as its index grows, as the host holds them."""
    return held_on_host(window[:, sequence, :, :size], dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def grow_index(attention: WaveAttention, state: WaveState, due: Array) -> WaveState:
    """Grow the indexes of the sequences that are due."""
    with implementation_of(attention):
        return growth.grow(attention.config, state, due)
