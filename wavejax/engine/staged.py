"""`fetch="staged"`: rows in the host's hands, for devices whose kernels cannot read host memory.

A decode step is then no single program: Python runs three a layer. The first says which rows are
missed; while their numbers come to the host, the second attends to all else; the rows are gathered
there, sent with `jax.device_put`, and the third attends to them, admits them to the row cache and
ends the layer. The tokens are those that rows read in place give, but for rounding.

The second program is queued before the rows are sent: a device that takes both in order has done it
by the time they are gathered.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels as ops
from models import decoder, unstacked
from models.config import ModelConfig
from models.parameters import Params
from pallas_kernels.attend_zones.reference import attend_rows
from pallas_kernels.numerics import list_places
from pallas_kernels.types import NO_ID, ZoneStates
from wavejax.attention.causal import causal_attention
from wavejax.attention.wave import WaveAttention, scale_of
from wavejax.engine import compiled, penalties
from wavejax.engine.compiled import NO_TOKEN, DecodeState, Parts
from wavejax.store.growth import grow
from wavejax.store.host_rows import HostRows
from wavejax.store.rows import RowStore
from wavejax.store.state import Selection, WaveState


@dataclasses.dataclass(frozen=True)
class StagedState:
    """The KV cache: on the device all but the rows. No pytree: a program gets `wave` alone.

    Attributes:
        wave: its store has no room.
        rows: the store.
    """

    wave: WaveState
    rows: HostRows


def wave_of(cache: Any) -> Any:
    """A cache without staged rows: what of it is a pytree."""
    return cache.wave if isinstance(cache, StagedState) else cache


def hold_rows(attention: WaveAttention, wave: WaveState) -> StagedState:
    """The state of an empty cache whose rows are staged."""
    layers, batch, kv_heads, _, *row = wave.store.rows.shape
    room = wave.index.token_ids.shape[-1]
    shape = (layers, batch, kv_heads, room, *row)
    widest = attention.config.most_retrieved(room)
    return StagedState(wave, HostRows(shape, widest, wave.store.rows.dtype))


def prefill_layer(
    model: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    length: Array,
    cache: StagedState,
) -> tuple[Array, StagedState]:
    """`programs.prefill_layer`, which also brings the rows to the host: one layer behind."""
    hidden, (wave, rows) = _prefill_layer(
        model, attention, params, hidden, layer, sequence, length, cache.wave
    )
    cache.rows.put((int(layer), int(sequence), slice(None), slice(0, rows.shape[1])), rows)
    return hidden, StagedState(wave, cache.rows)


def finish_prefill(
    model: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    sequence: Array,
    length: Array,
    cache: StagedState,
    logits: Array,
) -> tuple[StagedState, Array]:
    """`programs.finish_prefill`."""
    wave, logits = compiled.finish_prefill(
        model, attention, params, hidden, sequence, length, cache.wave, logits
    )
    return StagedState(wave, cache.rows), logits


def decode_n(
    generator: Parts, params: Params, state: DecodeState, steps: int
) -> tuple[DecodeState, Int[Array, "steps batch"]]:
    """`Generator.decode_n`."""
    nothing = jnp.full(state.finished.shape, NO_TOKEN, jnp.int32)
    tokens: list[Array] = []
    while len(tokens) < steps and not np.asarray(state.finished).all():
        rows = state.cache.rows
        inner, drawn, shown = _draw(generator, dataclasses.replace(state, cache=state.cache.wave))
        state = feed(
            generator,
            params,
            dataclasses.replace(inner, cache=StagedState(inner.cache, rows)),
            drawn,
        )
        tokens.append(shown)
    if not steps:
        return state, nothing[None][:0]
    return state, jnp.stack(tokens + [nothing] * (steps - len(tokens)))


def force(
    generator: Parts, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
    """`Generator.force`."""
    logits = []
    for step in tokens:
        logits.append(state.logits)
        state = feed(generator, params, state, step)
    return state, jnp.stack(logits) if logits else state.logits[None][:0]


def feed(
    generator: Parts, params: Params, state: DecodeState, tokens: Int[Array, " batch"]
) -> DecodeState:
    """`Generator.feed`: one decode step; donates the state."""
    model, attention = generator.model, generator.attention
    assert isinstance(attention, WaveAttention)
    wave, rows = state.cache.wave, state.cache.rows
    wave = _grow(attention, wave, rows, np.asarray(_due(attention, wave)))
    hidden, positions = _enter_step(model, attention, params, wave, tokens)
    for layer in range(model.num_layers):
        at, weights = np.int32(layer), unstacked.only_layer(params, layer)
        selection, missed, slots, wave = _select(
            model, attention, weights, at, hidden, positions, wave
        )
        missed.copy_to_host_async()
        zones, wave = _attend(attention, at, selection, wave)
        block = jax.device_put(rows.gather(layer, np.asarray(missed)))
        hidden, wave = _finish(
            model, weights, at, hidden, selection.query, zones, missed, slots, block, wave
        )
    logits, wave = _leave_step(model, attention, params, hidden, state.finished, wave)
    counts = state.counts and penalties.count_step(state.counts, tokens, state.finished)
    new = {"cache": StagedState(wave, rows), "logits": logits, "counts": counts}
    return dataclasses.replace(state, step=state.step + 1, **new)


def _grow(attention: WaveAttention, wave: WaveState, rows: HostRows, due: np.ndarray) -> WaveState:
    """Grows the due sequences' indexes, and takes the rows that leave their windows."""
    if not due.any():
        return wave
    size = attention.config.growth_tokens
    starts = np.asarray(wave.index.tokens)
    for sequence in np.flatnonzero(due).tolist():
        start = int(starts[sequence])
        oldest = _oldest(wave.steady.window, np.int32(sequence), size)
        rows.put((slice(None), sequence, slice(None), slice(start, start + size)), oldest)
    return _grow_index(attention, wave, due)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="wave")
def _prefill_layer(
    model: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    length: Array,
    wave: WaveState,
) -> tuple[Array, tuple[WaveState, Array]]:
    def attend(
        layer: Array, query: Array, key: Array, value: Array, wave: WaveState
    ) -> tuple[Array, tuple[WaveState, Array]]:
        output = causal_attention(query[0], key[0], value[0], scale=scale_of(query))[None]
        where = {"sequence": sequence, "length": length}
        rows, wave = attention.index_prompt(layer, key[0], value[0], wave, **where)
        return output, (wave, rows.astype(wave.store.rows.dtype))

    positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    return decoder.apply_layer(model, params, layer, hidden, positions, attend, wave)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _draw(generator: Parts, state: DecodeState) -> tuple[DecodeState, Array, Array]:
    return compiled.draw(generator, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _enter_step(
    model: ModelConfig, attention: WaveAttention, params: Params, wave: WaveState, tokens: Array
) -> tuple[Array, Array]:
    return decoder.embed(model, params, tokens[:, None]), attention.lengths(wave)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="wave")
def _select(
    model: ModelConfig,
    attention: WaveAttention,
    params: Params,
    layer: Array,
    hidden: Array,
    positions: Array,
    wave: WaveState,
) -> tuple[Selection, Array, Array, WaveState]:
    """What to attend to, and of it the rows that the cache does not hold, side by side."""
    inputs = decoder.enter_layer(model, decoder.pick_layer(params, layer), hidden, positions)
    selection, wave = attention.select(layer, *inputs, wave)
    missed = (selection.tokens != NO_ID) & ~selection.hit
    places = list_places(missed, missed.shape[-1])

    def of_missed(x: Array) -> Array:
        taken = jnp.take_along_axis(x, jnp.minimum(places, x.shape[-1] - 1), axis=-1)
        return jnp.where(places == NO_ID, NO_ID, taken)

    tokens, slots = of_missed(selection.tokens), of_missed(selection.slots)
    found = (jnp.where(selection.hit, x, NO_ID) for x in (selection.tokens, selection.slots))
    cached = dict(zip(("tokens", "slots"), found, strict=True))
    return selection._replace(**cached), tokens, slots, wave


@functools.partial(jax.jit, static_argnums=0, donate_argnames="wave")
def _attend(
    attention: WaveAttention, layer: Array, selection: Selection, wave: WaveState
) -> tuple[ZoneStates, WaveState]:
    """Attends to all that is on the device."""
    # Nothing is missed, so nothing is read of what stands for the store.
    stored = dataclasses.replace(wave, store=RowStore(wave.steady.window))
    zones, stored = attention.attend(layer, selection, stored)
    wave = dataclasses.replace(stored, store=wave.store)
    # The cache is the state's; no array may come out twice, to be donated twice.
    return zones._replace(cache_rows=jnp.zeros(0, wave.cache.rows.dtype)), wave


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("hidden", "wave"))
def _finish(
    model: ModelConfig,
    params: Params,
    layer: Array,
    hidden: Array,
    query: Array,
    zones: ZoneStates,
    tokens: Array,
    slots: Array,
    block: Array,
    wave: WaveState,
) -> tuple[Array, WaveState]:
    """Attends to the missed rows, admits them to the cache, and ends the layer."""
    batch, kv_heads, width = block.shape[:3]
    tokens, slots = tokens[..., :width], slots[..., :width]
    missed = attend_rows(query, block, tokens != NO_ID, scale=scale_of(query))
    parts = (
        jnp.concatenate([all_else, part[None]])
        for all_else, part in zip(zones[:2], missed, strict=True)
    )
    output, _ = ops.merge_states(*parts, dtype=query.dtype)
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    cached = wave.cache.rows.at[layer, b, h, slots].set(block, mode="drop")
    wave = dataclasses.replace(wave, cache=dataclasses.replace(wave.cache, rows=cached))
    output = output.reshape(batch, 1, -1, query.shape[-1])
    return decoder.leave_layer(model, decoder.pick_layer(params, layer), hidden, output), wave


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="wave")
def _leave_step(
    model: ModelConfig,
    attention: WaveAttention,
    params: Params,
    hidden: Array,
    finished: Array,
    wave: WaveState,
) -> tuple[Array, WaveState]:
    wave = attention.advance(wave, ~finished)
    last = decoder.final_norm(model, params, hidden[:, 0])
    return decoder.unembed(model, params, last), wave


_due = jax.jit(WaveAttention.due, static_argnums=0)


@functools.partial(jax.jit, static_argnums=2)
def _oldest(window: Array, sequence: Array, size: int) -> Array:
    return window[:, sequence, :, :size]


@functools.partial(jax.jit, static_argnums=0, donate_argnames="wave")
def _grow_index(attention: WaveAttention, wave: WaveState, due: Array) -> WaveState:
    return grow(attention.config, wave, due)
