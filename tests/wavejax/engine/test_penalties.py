"""Penalties against a plain loop of numpy: prompt and answer, batches, every attention."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import ATTENTIONS, MODEL, make_params, make_prompts
from wavejax import Generator, Sampler, WaveAttention
from wavejax.engine.penalties import TokenCounts, count, count_prompts, penalised
from wavejax.engine.sampling import settings_of

PROMPTS, STEPS = make_prompts((5, 79)), 12
ALL = Sampler(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.4)


def by_loop(sampler, logits, prompt, answer):
    """One sequence's logits with penalties, token by token, in float64."""
    found = logits.astype(np.float64)
    for token in set(prompt) | set(answer):
        worse = sampler.repetition_penalty
        found[token] = found[token] / worse if found[token] > 0 else found[token] * worse
    for token in answer:
        found[token] -= sampler.frequency_penalty
    for token in set(answer):
        found[token] -= sampler.presence_penalty
    return found


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(repetition_penalty=1.5),
        Sampler(repetition_penalty=0.6),
        Sampler(presence_penalty=1.2),
        Sampler(frequency_penalty=0.7),
        Sampler(presence_penalty=-0.5, frequency_penalty=-0.3),
        ALL,
    ],
)
def test_logits_are_those_of_the_loop(sampler):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 20, size) for size in (3, 40)]
    said = rng.integers(0, 20, (9, 2))
    finished = rng.random((9, 2)) < 0.2
    counts = count_prompts(prompts, 20)
    for tokens, ended in zip(said, finished, strict=True):
        counts = count(counts, jnp.asarray(tokens), jnp.asarray(ended))
    logits = rng.normal(size=(2, 20)).astype(np.float32)
    found = penalised(settings_of([sampler] * 2, 20).penalties, jnp.asarray(logits), counts)
    for b, prompt in enumerate(prompts):
        answer = said[~finished[:, b], b].tolist()
        expected = by_loop(sampler, logits[b], prompt.tolist(), answer)
        np.testing.assert_allclose(found[b], expected, atol=1e-5)


def generator_of(name, sampler):
    wave = ATTENTIONS["wave"]
    attentions = {
        "dense": ATTENTIONS["dense"],
        "wave": WaveAttention(wave.config, "device"),
        "staged": dataclasses.replace(wave, store="host", fetch="staged"),
    }
    return Generator(MODEL, attentions[name], sampler)


def answers_of(generator, prompts, **settings):
    state = generator.start(make_params(), prompts, STEPS, **settings)
    return np.asarray(generator.decode_n(make_params(), state, STEPS)[1])


@pytest.mark.parametrize(
    "name", ["dense", pytest.param("wave", marks=pytest.mark.slow(20)), "staged"]
)
def test_an_answer_is_that_of_the_loop(name):
    """Unequal prompts side by side; each step's logits are read before its token is drawn."""
    generator, params = generator_of(name, ALL), make_params()
    state = generator.start(params, PROMPTS, STEPS)
    said = [[], []]
    for _ in range(STEPS):
        logits = np.asarray(state.logits)
        state, tokens = generator.decode_n(params, state, 1)
        for b, prompt in enumerate(PROMPTS):
            expected = by_loop(ALL, logits[b], prompt, said[b])
            said[b].append(int(tokens[0, b]))
            assert said[b][-1] == int(np.argmax(expected))
    # In one call too, and what was said is what was counted.
    np.testing.assert_array_equal(answers_of(generator, PROMPTS), np.transpose(said))
    for b in range(2):
        counted = np.bincount(said[b], minlength=MODEL.vocab_size)
        np.testing.assert_array_equal(state.counts.generated[b], counted)
    plain = answers_of(generator_of(name, Sampler()), PROMPTS)
    assert not np.array_equal(plain, np.transpose(said))


def test_a_batch_changes_no_counts():
    generator = generator_of("dense", dataclasses.replace(ALL, temperature=1.0))
    together = answers_of(generator, PROMPTS)
    for i in range(2):
        alone = answers_of(generator, PROMPTS[i : i + 1], sequences=[i])
        np.testing.assert_array_equal(alone[:, 0], together[:, i])


def test_forced_tokens_count_as_said():
    generator, params = generator_of("dense", Sampler(frequency_penalty=2.0)), make_params()
    state = generator.start(params, PROMPTS, STEPS)
    forced = jnp.asarray([[3, 4], [3, 5], [3, 4]], jnp.int32)
    state, _ = generator.force(params, state, forced)
    assert state.counts.generated[0].tolist()[:6] == [0, 0, 0, 3, 0, 0]
    assert state.counts.generated[1].tolist()[:6] == [0, 0, 0, 0, 2, 1]


def test_without_penalties_nothing_is_counted():
    generator = generator_of("dense", Sampler(temperature=1.0, top_k=5))
    assert not generator.sampler.penalises
    assert generator.start(make_params(), PROMPTS, STEPS).counts is None
    for one in ("repetition", "presence", "frequency"):
        assert Sampler(**{f"{one}_penalty": 1.1}).penalises


def test_penalties_come_before_the_temperature():
    """At a low temperature a penalty of 1 weighs as 1 in the logits, not in what they become."""
    counts = TokenCounts(jnp.zeros((1, 2), bool), jnp.array([[1, 0]], jnp.int32))
    sampler = Sampler(temperature=0.1, presence_penalty=1.0)
    found = penalised(settings_of([sampler], 2).penalties, jnp.array([[1.5, 0.0]]), counts)
    np.testing.assert_allclose(found, [[0.5, 0.0]], atol=1e-6)
