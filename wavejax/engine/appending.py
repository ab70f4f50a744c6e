"""Reads more tokens into a sequence that was read: a question after a document, a chat's turn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from models import decoder, unstacked
from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params
from wavejax.attention import appended
from wavejax.attention.dense import DenseAttention
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine import compiled, staged
from wavejax.engine.interface import Engine
from wavejax.engine.prompts import bucket
from wavejax.engine.staged_state import StagedState
from wavejax.engine.state import DecodeState, commit
from wavejax.store.host_rows import HostRows

PIECE = 1024  # Tokens that run through the layers together, layer by layer.
# Where layers are written out, so many run through all of them in one program: a call of a program
# for each layer takes longer than the layer. Two lengths, so that two programs are compiled.
SHORT = 128
SHORTEST = 64  # What fewer tokens are padded to: most questions are short.
FEW = 3  # Pieces of `SHORT` up to which that is faster.


def append(
    engine: Engine,
    params: Params,
    state: DecodeState,
    slot: int,
    tokens: Int[np.ndarray, "_tokens"],
) -> DecodeState:
    """Read tokens into a slot's sequence; see `Generator.append`."""
    attention_state, logits = state.attention_state, state.logits
    rest = tokens
    while rest.size:
        attention_state, logits, count = append_some(
            engine, params, attention_state, logits, slot, rest
        )
        rest = rest[count:]
    counts = state.counts
    if counts is not None:
        seen = counts.in_prompt.at[slot, jnp.asarray(tokens)].set(True)
        counts = dataclasses.replace(counts, in_prompt=seen)
    return dataclasses.replace(
        state,
        attention_state=attention_state,
        logits=logits,
        counts=commit(counts),
        finished=commit(state.finished.at[slot].set(False)),
        nonfinite=commit(state.nonfinite.at[slot].set(False)),
    )


def append_some(
    engine: Engine,
    params: Params,
    attention_state: Any,
    logits: Array,
    slot: int,
    tokens: Int[np.ndarray, "_tokens"],
    free: int = 0,
) -> tuple[Any, Array, int]:
    """Read the first of some tokens into a slot's sequence, as many as one piece takes.

    Args:
        engine: what reads.
        params: the model's parameters.
        attention_state: as the engine holds it; donated.
        logits: `[batch, vocab]` float32; donated.
        slot: whose sequence.
        tokens: token ids, at least one, for which there is room.
        free: tokens that are known to need no growth; 0 waits for the device to ask.

    Returns:
        the attention state, the logits, and how many tokens were read.
    """
    while not free:
        arrays = engine.arrays_of(attention_state)
        free = int(np.asarray(appended.free_tokens(engine.attention, arrays))[slot])
        if not free:
            attention_state = grow(engine, attention_state)
    piece = tokens[: piece_tokens(engine, min(free, len(tokens)))]
    given = engine, params, attention_state, logits, slot, piece
    return *_append_piece(*given), len(piece)


def piece_tokens(engine: Engine, most: int) -> int:
    """Count the tokens of the next piece, where `most` are left that need no growth."""
    return min(most, SHORT if most <= FEW * SHORT and _in_one_program(engine) else PIECE)


def padded_piece(tokens: int) -> int:
    """Return what a piece is padded to: pieces of one length share compiled programs."""
    return SHORTEST if tokens <= SHORTEST else bucket(tokens)


def _in_one_program(engine: Engine) -> bool:
    """Whether short pieces run through all layers in one program: rows must be on the device."""
    return engine.unrolls and engine.attention.on_device == engine.attention


def check_append(engine: Engine, state: DecodeState, slot: int, tokens: int) -> None:
    """Raise InputError: the slot holds no sequence, or has no room; waits for the device."""
    attention: object = engine.attention
    if not isinstance(attention, WaveAttention | DenseAttention):
        raise InputError(
            "append is for WaveAttention and DenseAttention, and this is a "
            f"{type(attention).__name__}: use `force`"
        )
    arrays = engine.arrays_of(state.attention_state)
    if not int(engine.attention.lengths(arrays)[slot]):
        raise InputError(f"slot {slot} holds nothing: `insert` a prompt, which may be all of it")
    left = int(engine.attention.remaining(arrays)[slot])
    if tokens > left:
        raise InputError(
            f"{tokens} tokens are more than there is room for, {left}: give `start` or `allocate` "
            "a larger max_new_tokens"
        )


def _append_piece(
    engine: Engine,
    params: Params,
    attention_state: Any,
    logits: Array,
    slot: int,
    piece: Int[np.ndarray, "_tokens"],
) -> tuple[Any, Array]:
    model_config, ends = engine.model_config, unstacked.without_layers(params)
    padded = np.zeros((1, padded_piece(len(piece))), np.int32)
    padded[0, : len(piece)] = piece
    sequence, count = np.int32(slot), np.int32(len(piece))
    if len(piece) <= SHORT and _in_one_program(engine):
        given_all = params, padded, sequence, count, attention_state, logits
        return _append_short(model_config, engine.attention, *given_all)
    hidden = commit(compiled.embed(model_config, ends, jnp.asarray(padded)))
    rows: HostRows | None = None
    state = attention_state
    if isinstance(attention_state, StagedState):
        rows, state = attention_state.rows, attention_state.on_device
    for layer in range(model_config.num_layers):
        stored = None if rows is None else jax.device_put(rows.of(layer, slot))
        weights = unstacked.only_layer(params, layer)
        given = hidden, np.int32(layer), sequence, count, state, stored
        hidden, state = _append_layer(model_config, engine.attention, weights, *given)
    given_last = ends, hidden, sequence, count, state, logits
    state, logits = _finish(model_config, *given_last)
    return state if rows is None else StagedState(state, rows), logits


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("state", "logits"))
def _append_short(
    model_config: ModelConfig,
    attention: AnyAttention,
    params: Params,
    padded: Array,
    sequence: Array,
    count: Array,
    state: Any,
    logits: Array,
) -> tuple[Any, Array]:
    """Read a piece by all layers at once."""

    def append_one(
        layer: Array, query: Array, key: Array, value: Array, state: Any
    ) -> tuple[Array, Any]:
        # A layer's rows are read when its query is there: XLA would copy all layers' at the start.
        query, layer = jax.lax.optimization_barrier((query, layer))
        return appended.append(layer, query, key, value, state, sequence=sequence, count=count)

    first = attention.lengths(state)[sequence]
    positions = first + jnp.arange(padded.shape[1], dtype=jnp.int32)[None]
    # A function of its own: layers that are written out trace and lower it once.
    given = params, padded, positions, jax.jit(append_one), state
    hidden, state = decoder.apply_model(model_config, *given, unroll=True)
    last = jax.lax.dynamic_slice_in_dim(hidden[0], count - 1, 1)
    last = decoder.unembed(model_config, params, last)
    return appended.advance(state, sequence, count), logits.at[sequence].set(last[0])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _append_layer(
    model_config: ModelConfig,
    attention: AnyAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    count: Array,
    state: Any,
    stored: Array | None,
) -> tuple[Array, Any]:
    first = attention.lengths(state)[sequence]
    positions = first + jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    attend = functools.partial(appended.append, sequence=sequence, count=count, stored=stored)
    return decoder.apply_layer(model_config, params, layer, hidden, positions, attend, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("state", "logits"))
def _finish(
    model_config: ModelConfig,
    params: Params,
    hidden: Array,
    sequence: Array,
    count: Array,
    state: Any,
    logits: Array,
) -> tuple[Any, Array]:
    last = jax.lax.dynamic_slice_in_dim(hidden[0], count - 1, 1)
    last = decoder.unembed(model_config, params, decoder.final_norm(model_config, params, last))
    return appended.advance(state, sequence, count), logits.at[sequence].set(last[0])


def grow(engine: Engine, attention_state: Any) -> Any:
    """Move the oldest tokens of full windows into their indexes."""
    attention = engine.attention
    if not isinstance(attention_state, StagedState):
        return _grow_compiled(attention, attention_state)
    assert isinstance(attention, WaveAttention)
    on_device, rows = attention_state.on_device, attention_state.rows
    due = np.asarray(staged.programs.due(attention, on_device))
    return StagedState(staged.grow(attention, on_device, rows, due), rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _grow_compiled(attention: AnyAttention, state: Any) -> Any:
    return attention.grow(state)
