"""One dense prefill for all methods: it is exact whatever the attention, so they can share it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from pallas_kernels.rounding import quantise
from wavejax.attention.dense import DenseState
from wavejax.attention.wave import WaveAttention
from wavejax.config import DECODE_SETTINGS, WaveConfig
from wavejax.engine.generator import DecodeState, Generator
from wavejax.evaluation.baselines import SparseState
from wavejax.store.shape import CacheShape


class SharedPrefill:
    """States for every method from what full attention's prefill left.

    An index is built once for methods that can share it and follow one another: only the last one
    built is kept.

    Args:
        dense: the state that a generator with `DenseAttention` started, its keys and values in the
            model's dtype; never donated.
        prompt_tokens: room for prompts in the methods' states, at least the longest one, and at
            most what the dense cache has; the same for all batches that should share programs.
        new_tokens: room for so many tokens more; the dense cache must have it too.
    """

    def __init__(self, dense: DecodeState, prompt_tokens: int, new_tokens: int):
        self.dense, self.prompt_tokens, self.new_tokens = dense, prompt_tokens, new_tokens
        self._builder: WaveAttention | None = None
        self._built: Any = None

    def state(self, generator: Generator) -> DecodeState:
        """Return a state of the generator's own, after the prompts; may be donated."""
        dense, attention = self.dense, generator.attention
        full = dense.attention_state
        assert isinstance(full, DenseState)
        if attention.has_index:
            cache = self._index(generator, attention, full)
        elif attention.state_type is SparseState:
            cache = SparseState(full.keys, full.values, full.tokens, full.tokens)
        elif attention.row_dtype == "int8":
            cache = _rounded(full)
        else:
            cache = full
        return jax.tree.map(jnp.copy, dataclasses.replace(dense, attention_state=cache))

    def clusters(self, generator: Generator) -> Float[np.ndarray, " batch"] | None:
        """Count the clusters of each sequence, in the mean of layers and kv heads; None without."""
        full, attention = self.dense.attention_state, generator.attention
        if not attention.has_index:
            return None
        assert isinstance(full, DenseState)
        index = self._index(generator, attention, full).index
        return np.asarray(index.num_clusters, np.float64).mean(axis=(0, 2))

    def _index(self, generator: Generator, attention: Any, full: DenseState) -> Any:
        # Methods that differ in nothing but these share their index.
        plain = {name: getattr(WaveConfig(), name) for name in DECODE_SETTINGS}
        # The room for an index does not depend on what decoding asks for, but a row cache's does.
        if attention.has_cache:
            del plain["min_retrieved_tokens"]
        config = dataclasses.replace(attention.config, **plain)
        builder = WaveAttention(config, attention.store, attention.fetch, cached=attention.cached)
        if builder != self._builder:
            self._builder, self._built = builder, None  # Let go before there are two.
            self._built = build_index(
                builder,
                generator,
                full,
                self.prompt_tokens,
                self.new_tokens,
            )
        return self._built


def build_index(
    attention: WaveAttention,
    generator: Generator,
    full: DenseState,
    prompt_tokens: int,
    new_tokens: int,
) -> Any:
    """Return a wave state from a dense cache, without running the model; see `SharedPrefill`."""
    batch, numbers = full.tokens.shape[0], (full.keys.data, full.values.data)
    model, dtype = generator.model_config, full.keys.dtype
    shape = CacheShape.of(model)
    cache = attention.init_state(shape, batch, prompt_tokens, new_tokens, dtype)
    for sequence in range(batch):
        where = jnp.int32(sequence), full.tokens[sequence]
        for layer in range(model.num_layers):
            cache = _write(attention, jnp.int32(layer), *where, *numbers, cache, prompt_tokens)
        cache = _finish(attention, cache, *where)
    return cache


@jax.jit
def _rounded(full: DenseState) -> DenseState:
    """Round keys and values as full attention in int8 writes them."""
    return DenseState(quantise(full.keys.data), quantise(full.values.data), full.tokens)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnames="cache")
def _write(
    attention: WaveAttention,
    layer: Array,
    sequence: Array,
    length: Array,
    keys: Array,
    values: Array,
    cache: Any,
    room: int,
) -> Any:
    key, value = (jnp.swapaxes(x[layer, sequence, :, :room], 0, 1) for x in (keys, values))
    return attention.write_prompt(layer, key, value, cache, sequence=sequence, length=length)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _finish(attention: WaveAttention, cache: Any, sequence: Array, length: Array) -> Any:
    return attention.finish_prefill(cache, sequence, length)
