"""Logits that are not finite: said, never made into tokens, and no other sequence's matter."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import ATTENTIONS, GREEDY, MODEL, SAMPLED, make_params
from wavejax import Generator, WaveAttention
from wavejax.engine.generator import NO_TOKEN

# An embedding of its own, so that a token may be NaN to read and yet be sound to draw.
UNTIED = dataclasses.replace(MODEL, tie_embeddings=False)
BAD = 49
PROMPTS = ((1, 2, 3), (4, 5, 6, 7), (8, 9))
ROOM = 20


def params_with(value):
    """The tiny model's, but that token `BAD` is embedded as this value."""
    tree = make_params()["params"]
    table = tree["embedding"]
    return {"params": tree | {"embedding": table.at[BAD].set(value), "unembedding": table + 0.0}}


def generator_of(name, sampler=GREEDY, stop_tokens=()):
    wave = ATTENTIONS["wave"]
    attentions = {
        "dense": ATTENTIONS["dense"],
        "wave": WaveAttention(wave.config, "device"),
        "staged": dataclasses.replace(wave, store="host", fetch="staged"),
    }
    return Generator(UNTIED, attentions[name], sampler, stop_tokens)


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["dense", "wave", "staged"])
def test_one_sequence_ends_and_the_others_go_on(name, sampler):
    generator, params = generator_of(name, sampler), params_with(np.nan)
    runs = {}
    for token in (7, BAD):
        state = generator.start(params, PROMPTS, ROOM)
        state, _ = generator.decode_n(params, state, 2)
        state, _ = generator.force(params, state, jnp.asarray([[1, token, 2]], jnp.int32))
        assert not state.nonfinite.any()  # nothing was to be drawn yet
        state, tokens = generator.decode_n(params, state, 3)
        state, later = generator.decode_n(params, state, 3)
        runs[token] = state, np.concatenate([tokens, later])
    (sound, expected), (state, found) = runs[7], runs[BAD]
    assert (expected != NO_TOKEN).all()
    assert not sound.nonfinite.any()
    assert state.nonfinite.tolist() == state.finished.tolist() == [False, True, False]
    assert (found[:, 1] == NO_TOKEN).all()
    np.testing.assert_array_equal(found[:, ::2], expected[:, ::2])
    np.testing.assert_array_equal(state.logits[::2], sound.logits[::2])


@pytest.mark.parametrize("name", ["dense", "wave", "staged"])
def test_the_stream_of_a_bad_prompt_ends_without_a_token(name):
    generator, params = generator_of(name), params_with(np.inf)
    state = generator.start(params, [[1, BAD, 3]], ROOM)
    parts = []
    for newest, tokens in generator.stream(params, state, ROOM):
        state = newest
        parts.append(tokens)
    assert len(parts) == 1
    assert (np.concatenate(parts) == NO_TOKEN).all()
    assert state.nonfinite.tolist() == [True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_bad_logit_is_enough(value):
    generator, params = generator_of("dense"), make_untied()
    state = generator.start(params, PROMPTS, ROOM)
    state = dataclasses.replace(state, logits=state.logits.at[2, 11].set(value))
    state, tokens = generator.decode_n(params, state, 2)
    assert state.nonfinite.tolist() == [False, False, True]
    assert (np.asarray(tokens)[:, 2] == NO_TOKEN).all()


def test_what_comes_after_an_end_is_not_said():
    """Of a sequence that has stopped, logits say nothing of its answer."""
    generator, params = generator_of("dense"), make_untied()
    state = generator.start(params, PROMPTS, ROOM)
    finished = jnp.asarray([False, False, True])
    logits = state.logits.at[2].set(np.nan)
    state = dataclasses.replace(state, logits=logits, finished=finished)
    state, tokens = generator.decode_n(params, state, 2)
    assert not state.nonfinite.any()
    assert (np.asarray(tokens)[:, 2] == NO_TOKEN).all()


def test_forcing_returns_logits_as_they_are():
    generator, params = generator_of("dense"), params_with(np.nan)
    state = generator.start(params, PROMPTS, ROOM)
    tokens = jnp.asarray([[1, BAD, 2], [3, 4, 5]], jnp.int32)
    state, logits = generator.force(params, state, tokens)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1, 1]).all()
    assert np.isfinite(logits[1, ::2]).all()
    assert not state.finished.any()


def test_what_was_sound_before_is_kept():
    """float16 weights that overflow on one token: the tokens before it are the answer."""
    generator, params = generator_of("dense"), params_with(0.0)
    state = generator.start(params, PROMPTS[:1], ROOM)
    expected = np.asarray(generator.decode_n(params, state, 6)[1])[:, 0]
    stop = int(expected[3])
    first = expected.tolist().index(stop)
    table = params["params"]["embedding"].at[stop].set(np.nan)
    bad = {"params": params["params"] | {"embedding": table}}
    state = generator.start(bad, PROMPTS[:1], ROOM)
    state, found = generator.decode_n(bad, state, 6)
    found = np.asarray(found)[:, 0]
    if stop not in PROMPTS[0]:
        np.testing.assert_array_equal(found[: first + 1], expected[: first + 1])
    assert (found[first + 1 :] == NO_TOKEN).all()
    assert state.nonfinite.tolist() == [True]


def make_untied():
    return params_with(0.25)
