"""Teacher forcing and answers: what is compared with what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator
from wavejax.engine.generator import NO_TOKEN
from wavejax.engine.prompts import bucket
from wavejax.evaluation import teacher_forcing
from wavejax.evaluation.baselines import SparseAttention
from wavejax.evaluation.shared_prefill import SharedPrefill
from wavejax.evaluation.teacher_forcing import answer, bins, greedy, judge, places_of, sample_keys

STEPS = 11
PROMPTS = make_prompts([200, 90])
FULL = Generator(MODEL, DenseAttention())
# The window is the local tokens: whatever lies before them is not read.
METHOD = Generator(
    MODEL,
    SparseAttention(dataclasses.replace(CONFIG, min_retrieved_tokens=0, retrieval_fraction=0)),
)


@pytest.fixture
def shared():
    return SharedPrefill(FULL.start(make_params(), PROMPTS, STEPS), bucket(200), STEPS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Answers of 11 tokens then take three calls."""
    monkeypatch.setattr(teacher_forcing, "CHUNK", 4)


def tokens_of(answers):
    return np.concatenate([np.asarray(part.tokens)[: part.steps] for part in answers])


def test_the_answer_is_the_generators_own(shared):
    answers = answer(FULL, make_params(), shared.state(FULL), STEPS)
    assert [part.steps for part in answers] == [4, 4, 3]
    _, expected = FULL.decode_n(make_params(), shared.state(FULL), STEPS)
    np.testing.assert_array_equal(tokens_of(answers), expected)


def test_an_answer_that_is_drawn_depends_on_the_samples_number_alone(shared):
    """Not on who else is in the batch, nor on the place in it: a stopped evaluation may go on in
    other batches."""
    params = make_params()

    def drawn(prompts, numbers, seed=5):
        state = SharedPrefill(FULL.start(params, prompts, STEPS), bucket(200), STEPS).state(FULL)
        keys = jnp.concatenate([sample_keys(seed, number, 1) for number in numbers])
        return tokens_of(answer(FULL, params, state, STEPS, keys=keys))

    together = drawn(PROMPTS, (6, 7))
    np.testing.assert_array_equal(together, drawn(PROMPTS[::-1], (7, 6))[:, ::-1])
    np.testing.assert_array_equal(together[:, :1], drawn(PROMPTS[:1], (6,)))
    assert (together != drawn(PROMPTS, (6, 8)))[:, 1].any()
    assert (together != drawn(PROMPTS, (6, 7), seed=6)).any(axis=0).all()
    assert jax.random.key_data(sample_keys(5, 6, 2)).tolist() == [
        jax.random.key_data(sample_keys(5, number, 1))[0].tolist() for number in (6, 7)
    ]
    # The same prompt twice in a batch is answered in two ways.
    twice = drawn([PROMPTS[0], PROMPTS[0]], (6, 7))
    assert (twice[:, 0] != twice[:, 1]).any()
    sample_keys(-(2**70), 0, 1)  # any number may be a seed


def test_tokens_are_drawn_as_often_as_is_probable(monkeypatch):
    """One step, many numbers: the draws fit softmax(logits), and no token of all."""
    monkeypatch.setattr(teacher_forcing, "CHUNK", 1)
    params, count = make_params(), 512
    shared = SharedPrefill(FULL.start(params, [PROMPTS[1]] * 8, 1), bucket(200), 1)
    found = np.concatenate(
        [
            tokens_of(answer(FULL, params, shared.state(FULL), 1, keys=sample_keys(1, first, 8)))[0]
            for first in range(0, count, 8)
        ]
    )
    p = np.asarray(jax.nn.softmax(shared.state(FULL).logits[0]), np.float64)
    # In bins of about equal probability: chi-square of 7 degrees of freedom, 1 in 10,000.
    order = np.argsort(p)
    edge = np.searchsorted(np.cumsum(p[order]), np.arange(1, 8) / 8)
    bin_of = np.empty(len(p), int)
    bin_of[order] = np.searchsorted(edge, np.arange(len(p)), side="right")
    expected = count * np.bincount(bin_of, p, 8)
    seen = np.bincount(bin_of[found], minlength=8)
    assert np.sum((seen - expected) ** 2 / expected) < 29.9


def test_a_judgement_is_what_forcing_gives(shared):
    params = make_params()
    answers = answer(FULL, params, shared.state(FULL), STEPS)
    found = judge(METHOD, params, shared.state(METHOD), answers)
    said = tokens_of(answers)
    _, own = METHOD.force(params, shared.state(METHOD), jnp.asarray(said))
    _, full = FULL.force(params, shared.state(FULL), jnp.asarray(said))
    own, full = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (own, full))
    np.testing.assert_allclose(found.kl, (np.exp(full) * (full - own)).sum(-1), atol=1e-5)
    nll = -np.take_along_axis(own, said[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nll, nll, atol=1e-5)
    np.testing.assert_array_equal(found.best, own.argmax(-1))
    assert found.kl.mean() > 1e-3  # the method does differ
    same = judge(FULL, params, shared.state(FULL), answers)
    np.testing.assert_allclose(same.kl, 0, atol=1e-6)
    np.testing.assert_array_equal(same.best, said)


def test_given_text_is_forced(shared):
    given = np.random.default_rng(0).integers(0, MODEL.vocab_size, (STEPS, 2))
    answers = answer(FULL, make_params(), shared.state(FULL), STEPS, given)
    np.testing.assert_array_equal(tokens_of(answers), given)
    _, logits = FULL.force(make_params(), shared.state(FULL), jnp.asarray(given))
    found = np.concatenate([np.asarray(part.logits)[: part.steps] for part in answers])
    np.testing.assert_allclose(found, logits, atol=1e-5)


def test_answers_end_at_stop_tokens(shared):
    params = make_params()
    said = tokens_of(answer(FULL, params, shared.state(FULL), STEPS))
    # Both sequences' second token ends them.
    stops = tuple({int(token) for token in said[1]})
    stopping = dataclasses.replace(FULL, stop_tokens=stops)
    answers = answer(stopping, params, shared.state(stopping), STEPS)
    _, expected = stopping.decode_n(params, shared.state(stopping), STEPS)
    expected = np.asarray(expected)
    ends = int((expected != NO_TOKEN).any(axis=1).sum())
    assert ends < STEPS
    np.testing.assert_array_equal(tokens_of(answers), expected[:ends])
    method = dataclasses.replace(METHOD, stop_tokens=stops)
    found = greedy(method, params, shared.state(method), answers, STEPS)
    _, expected = method.decode_n(params, shared.state(method), STEPS)
    np.testing.assert_array_equal(found, expected)
    # A stop token that is forced ends nothing: what follows is judged all the same.
    rest = answer(FULL, params, shared.state(FULL), STEPS)
    judged = judge(method, params, shared.state(method), rest)
    np.testing.assert_array_equal(
        judged.best, judge(METHOD, params, shared.state(METHOD), rest).best
    )


def test_places_of_a_reference_in_an_answer():
    pieces = [" ", "12", "3A", "5", ".", ""]
    np.testing.assert_array_equal(places_of("123a5", pieces), [1, 2, 3])
    np.testing.assert_array_equal(places_of("23", pieces), [1, 2])
    assert places_of("99", pieces) is None


def test_bins_are_means_in_turn():
    assert list(bins(np.array([1.0, 3.0, 5.0, 7.0, 9.0]), 2)) == [2.0, 6.0, 9.0]


def test_states_are_not_shared(shared):
    first = shared.state(FULL)
    FULL.decode_n(make_params(), first, 2)
    assert first.attention_state.keys.data.is_deleted()
    assert not shared.dense.attention_state.keys.data.is_deleted()
    assert jnp.isfinite(shared.state(FULL).attention_state.keys.data).all()
