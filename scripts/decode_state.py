"""States of full and wave attention to decode from: filled with random rows, or by real prompts."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_model import clustered_rows, new_key
from jax import Array, lax

from models.config import ModelConfig
from models.parameters import Params
from wavejax import Generator
from wavejax.attention.protocol import AnyAttention
from wavejax.engine.generator import DecodeState
from wavejax.engine.prompts import answer_room, bucket, least_of_bucket
from wavejax.engine.staged_state import StagedState, hold_rows, on_device_of
from wavejax.store.shape import CacheShape
from wavejax.store.steady import SteadyZone


@dataclasses.dataclass(frozen=True)
class Filled:
    """A state, and what filling it took.

    Attributes:
        state: of `batch` sequences of `context` tokens each.
        seconds: for each sequence, what filling it took once compiled. Of a real prefill all of
            it, from tokens to cache; else the caches alone, random numbers included.
    """

    state: DecodeState
    seconds: list[float]


def fill(
    generator: Generator,
    params: Params,
    batch: int,
    context: int,
    new_tokens: int,
    dtype: str,
    *,
    real: bool,
) -> Filled:
    """Make a state with room for so many new tokens.

    Args:
        generator: gives model and attention.
        params: read by a real prefill only.
        batch: sequences.
        context: tokens of each.
        new_tokens: room for so many more.
        dtype: of the caches.
        real: read random prompts, instead of writing random keys and values.
    """
    if real:
        return _read_prompts(generator, params, batch, context, new_tokens)
    return _write_rows(generator, batch, context, new_tokens, dtype)


def _read_prompts(
    generator: Generator, params: Params, batch: int, context: int, new_tokens: int
) -> Filled:
    vocab = generator.model_config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab, (batch, context)).tolist()
    # Of a batch the first prompt compiles; a single prompt is read twice.
    for _ in range(1 if batch > 1 else 2):
        ends = [time.perf_counter()]

        def note(done: int, total: int, ends: list[float] = ends) -> None:
            if done % (total // batch) == 0:
                ends.append(time.perf_counter())

        state = None  # frees the first one's
        state = generator.start(params, prompts, new_tokens, progress=note)
    seconds = np.diff(ends).tolist()
    assert state is not None
    return Filled(state, seconds[1:] if batch > 1 else seconds)


def _write_rows(
    generator: Generator, batch: int, context: int, new_tokens: int, dtype: str
) -> Filled:
    model, attention = generator.model_config, generator.attention
    # As large as a real prompt's would be.
    room = bucket(context)
    least = least_of_bucket(context)
    cache: Any = attention.init_state(
        CacheShape.of(model), batch, room, answer_room(new_tokens), dtype, shortest_prompt=least
    )
    logits = jnp.zeros((batch, model.vocab_size), jnp.float32)
    rest = jnp.zeros(batch, bool), jnp.int32(0), jnp.int32(0)
    cache, logits, rest = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding), (cache, logits, rest)
    )
    length = jnp.int32(context)
    stored = None
    if attention.staged:
        staging: Any = attention
        stored = hold_rows(staging, cache).rows

    def write(cache: Any, layer: int, sequence: int) -> Any:
        at = jnp.int32(layer), jnp.int32(sequence)
        cache, rows = _write_layer(model, attention, room, dtype, cache, *at, length)
        if stored is not None:
            stored.put((layer, sequence, slice(None), slice(rows.shape[1])), rows)
        return cache

    # Compiles, before the clock runs.
    cache = write(cache, 0, 0)
    seconds = []
    for sequence in range(batch):
        jax.block_until_ready(cache)
        start = time.perf_counter()
        for layer in range(model.num_layers):
            cache = write(cache, layer, sequence)
        jax.block_until_ready(cache)
        if stored is not None:
            stored.take_in()
        seconds.append(time.perf_counter() - start)
        cache = _finish(attention, cache, jnp.int32(sequence), length)
    if stored is not None:
        cache = StagedState(cache, stored)
    return Filled(DecodeState(cache, logits, *rest), seconds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="cache")
def _write_layer(
    model: ModelConfig,
    attention: AnyAttention,
    room: int,
    dtype: str,
    cache: Any,
    layer: Array,
    sequence: Array,
    length: Array,
) -> tuple[Any, Array | None]:
    """Return the cache, and the rows that are not written to it, if they are staged."""
    key = jax.random.fold_in(jax.random.fold_in(new_key(1), layer), sequence)
    keys, values = clustered_rows(model, room, dtype, key)
    where = {"sequence": sequence, "length": length}
    if attention.staged:
        staging: Any = attention
        rows, cache = staging.index_prompt(layer, keys, values, cache, **where)
        return cache, rows
    return attention.write_prompt(layer, keys, values, cache, **where), None


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _finish(attention: AnyAttention, cache: Any, sequence: Array, length: Array) -> Any:
    return attention.finish_prefill(cache, sequence, length)


def about_to_grow(generator: Generator, state: DecodeState, dtype: str) -> DecodeState:
    """Fill every sequence's window: the next step makes the index grow."""
    cache = on_device_of(state.attention_state)
    cache = dataclasses.replace(
        cache, steady=_fill_window(generator.model_config, dtype, cache.steady)
    )
    if isinstance(state.attention_state, StagedState):
        cache = dataclasses.replace(state.attention_state, on_device=cache)
    return dataclasses.replace(state, attention_state=cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="steady")
def _fill_window(model: ModelConfig, dtype: str, steady: SteadyZone) -> SteadyZone:
    layers, batch, _, window, _, _ = steady.window.shape

    def rows(key: Array) -> Array:
        keys, values = clustered_rows(model, window, dtype, key)
        return jnp.swapaxes(jnp.stack([keys, values], axis=2), 0, 1)

    made = lax.map(rows, jax.random.split(new_key(2), layers * batch))
    return dataclasses.replace(
        steady,
        window=made.reshape(steady.window.shape).astype(steady.window.dtype),
        window_tokens=jnp.full_like(steady.window_tokens, window),
    )
