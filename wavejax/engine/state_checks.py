"""Whether a generator can go on with a state, and whether parameters are its model's."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import InputError
from wavejax.engine.checks import check_range
from wavejax.engine.interface import Engine
from wavejax.engine.sampling import Sampler, fits
from wavejax.engine.state import DecodeState, was_donated

_DTYPES = ("float32", "bfloat16", "float16")


def check_state(engine: Engine, sampler: Sampler, state: Any) -> None:
    """Check what is to be decoded from; wait for nothing.

    Raises:
        InputError: it is no state, one that was donated to an earlier call, one of another
            attention, or one without the counts that the sampler's penalties need.
    """
    if not isinstance(state, DecodeState):
        raise InputError(
            f"the state is of type {type(state).__name__}; give the DecodeState that `start`, or "
            "the last call, returned"
        )
    if not engine.holds(state.attention_state):
        raise InputError(
            f"the state is not {type(engine.attention).__name__}'s of this generator: go on with "
            "the generator that started it, or one of the same attention"
        )
    arrays = engine.arrays_of(state.attention_state)
    if was_donated((arrays, state.logits, state.finished)):
        raise InputError(
            "this state was given to an earlier call, which used it up: go on with the state that "
            "the call returned"
        )
    if sampler.penalises and (state.counts is None or state.sampling.penalties is None):
        raise InputError(
            "the sampler's penalties need counts that this state has not: start it with a "
            "generator whose sampler has penalties too"
        )


def check_draws(sampler: Sampler, state: DecodeState) -> None:
    """Raise InputError: tokens are to be drawn as a state was not started for."""
    if not fits(sampler, state.sampling, state.logits.shape[1]):
        raise InputError(
            "the generator's sampler draws at random, or among ranked tokens, and this state was "
            "not started for that: start it with a generator whose sampler does so too"
        )


def check_room(engine: Engine, state: DecodeState, tokens: jax.Array) -> None:
    """Raise InputError: there is no room for so many tokens `[steps, batch]`, or one is wrong."""
    going = ~np.asarray(state.finished)
    left = np.asarray(engine.attention.remaining(engine.arrays_of(state.attention_state)))[going]
    if left.size and len(tokens) > left.min():
        raise InputError(
            f"{len(tokens)} tokens are more than there is room for, {left.min()}: give "
            "`start` a larger max_new_tokens"
        )
    if not isinstance(tokens, jax.core.Tracer):
        check_range(np.asarray(tokens)[:, going], engine.model_config.vocab_size)


def as_samplers(samplers: Any, batch: int | None, default: Sampler) -> list[Sampler]:
    """Return a sampler for each prompt: the default one where none are given.

    Raises:
        InputError: there are more or fewer than prompts (`batch`, None: any number), or one is no
            `Sampler`.
    """
    if samplers is None:
        return [default] * (batch or 0)
    if not isinstance(samplers, Iterable):
        raise InputError(
            f"samplers is of type {type(samplers).__name__}; give a list of Samplers, one a prompt"
        )
    listed = list(samplers)
    for one in listed:
        if not isinstance(one, Sampler):
            raise InputError(f"a sampler is of type {type(one).__name__}; give a Sampler")
    if batch is not None and len(listed) != batch:
        raise InputError(f"samplers has {len(listed)} for {batch} prompts; give one each")
    return listed


def check_params(params: Any, model_config: ModelConfig) -> None:
    """Raise InputError: they are no parameters, not the model's, or of a dtype that none has."""
    try:
        embedding = params["params"]["embedding"]
        shape, dtype = tuple(embedding.shape), jnp.dtype(embedding.dtype).name
        _ = params["params"]["layers"]
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            'params is no tree of parameters, {"params": {"embedding": ..., "layers": ...}}: give '
            "what `Checkpoint.load_params` returns"
        ) from None
    expected = (model_config.vocab_size, model_config.hidden_size)
    if shape != expected:
        raise InputError(
            f"params have an embedding of {list(shape)}; the model's is {list(expected)}: give the "
            "parameters of the same model"
        )
    if dtype not in _DTYPES:
        raise InputError(f"params are {dtype}; they must be one of {', '.join(_DTYPES)}")
