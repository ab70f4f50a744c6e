"""Whether a generator can go on with a state, and whether parameters are its model's."""

from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.errors import InputError
from wavejax.attention.wave import WaveAttention
from wavejax.engine.compiled import DecodeState, Parts
from wavejax.engine.staged import StagedState, wave_of
from wavejax.store.state import WaveState

_DTYPES = ("float32", "bfloat16", "float16")


def check_state(generator: Parts, state: Any) -> None:
    """Checks what is to be decoded from; waits for nothing.

    Raises:
        InputError: it is no state, one that was donated to an earlier call, one of another
            attention, or one without the counts that the sampler's penalties need.
    """
    if not isinstance(state, DecodeState):
        raise InputError(
            f"the state is of type {type(state).__name__}; give the DecodeState that `start`, or "
            "the last call, returned"
        )
    cache = wave_of(state.cache)
    leaves = jax.tree.leaves((cache, state.logits, state.finished))
    if any(isinstance(leaf, jax.Array) and _is_deleted(leaf) for leaf in leaves):
        raise InputError(
            "this state was given to an earlier call, which used it up: go on with the state that "
            "the call returned"
        )
    attention = generator.attention
    wants_wave = isinstance(attention, WaveAttention)
    if wants_wave != isinstance(cache, WaveState) or (
        isinstance(attention, WaveAttention)
        and attention.staged != isinstance(state.cache, StagedState)
    ):
        raise InputError(
            f"the state is not {type(attention).__name__}'s of this generator: go on with the "
            "generator that started it, or one of the same attention"
        )
    if generator.sampler.penalises and state.counts is None:
        raise InputError(
            "the sampler's penalties need counts that this state has not: start it with a "
            "generator whose sampler has penalties too"
        )


def _is_deleted(leaf: jax.Array) -> bool:
    return not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def check_params(params: Any, model: ModelConfig) -> None:
    """Raises InputError: they are no parameters, not the model's, or of a dtype that none has."""
    try:
        embedding = params["params"]["embedding"]
        shape, dtype = tuple(embedding.shape), jnp.dtype(embedding.dtype).name
        _ = params["params"]["layers"]
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            'params is no tree of parameters, {"params": {"embedding": ..., "layers": ...}}: give '
            "what `Checkpoint.load_params` returns"
        ) from None
    expected = (model.vocab_size, model.hidden_size)
    if shape != expected:
        raise InputError(
            f"params have an embedding of {list(shape)}; the model's is {list(expected)}: give the "
            "parameters of the same model"
        )
    if dtype not in _DTYPES:
        raise InputError(f"params are {dtype}; they must be one of {', '.join(_DTYPES)}")
