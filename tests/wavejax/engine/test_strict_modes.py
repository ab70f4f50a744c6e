"""JAX's strict modes, as scientific programs set them: the same tokens in each."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import ATTENTIONS, MODEL, make_params, make_prompts
from wavejax import Generator, Sampler, WaveAttention
from wavejax.store.shape import CacheShape

# The second prompt's index grows after five tokens.
PROMPTS, STEPS = make_prompts((150, 79)), 8
SAMPLER = Sampler(temperature=1.0, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3)
# What refuses is set all at once: each setting compiles every program anew.
MODES = {
    "64 bits": {"jax_enable_x64": True},
    "other numbers": {"jax_default_prng_impl": "rbg"},
    "strict": {
        "jax_transfer_guard": "disallow",
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
        "jax_debug_nans": True,
    },
}


def attentions():
    wave = ATTENTIONS["wave"]
    return {
        "dense": ATTENTIONS["dense"],
        "host": wave,
        "device": WaveAttention(wave.config, "device"),
        "staged": dataclasses.replace(wave, store="host", fetch="staged"),
    }


@contextlib.contextmanager
def modes(**settings):
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        yield


def everything(generator):
    """The tokens of a stream, and the logits of tokens that were forced and fed."""
    params = make_params()
    state = generator.start(params, PROMPTS, STEPS, seed=3)
    parts = []
    for newest, tokens in generator.stream(params, state, STEPS):
        state = newest
        parts.append(tokens)
    generator.facts(state)
    # numpy's numbers are of 64 bits.
    state, logits = generator.force(params, state, np.array([[1, 2], [3, 4]]))
    state = generator.feed(params, state, np.array([5, 6]))
    return np.concatenate(parts), np.asarray(logits), np.asarray(state.logits)


@pytest.mark.slow(60)
@pytest.mark.parametrize("name", ["dense", "host", "device", "staged"])
def test_every_mode_gives_the_same(name):
    generator = Generator(MODEL, attentions()[name], SAMPLER, (7,))
    expected = everything(generator)
    for changed, settings in MODES.items():
        with modes(**settings):
            found = everything(generator)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(other, one, err_msg=changed)
            assert other.dtype == one.dtype


def test_the_callers_modes_are_as_they_were():
    generator = Generator(MODEL, ATTENTIONS["dense"], SAMPLER)
    with modes(jax_enable_x64=True):
        state = generator.start(make_params(), PROMPTS, STEPS)
        for _ in generator.stream(make_params(), state, STEPS):
            # Between two calls of the device too.
            assert jnp.arange(2).dtype == jnp.int64
        assert jnp.arange(2).dtype == jnp.int64


def test_full_attention_writes_a_prompt_with_numbers_of_64_bits():
    """Where `DenseAttention` is part of a caller's own program, the caller's modes hold."""
    attention = ATTENTIONS["dense"]
    with modes(jax_enable_x64=True):
        state = attention.init_state(CacheShape.of(MODEL), 1, 16, 4, jnp.float32)
        query = jnp.ones((1, 16, 4, 16), jnp.float32)
        key = jnp.ones((1, 16, 2, 16), jnp.float32)
        at = {"sequence": jnp.int32(0), "length": jnp.int32(16)}
        output, state = attention.prefill(jnp.int32(1), query, key, key, state, **at)
        state = attention.finish_prefill(state, *at.values())
    assert output.dtype == state.keys.dtype == jnp.float32
    assert state.tokens.dtype == jnp.int32
