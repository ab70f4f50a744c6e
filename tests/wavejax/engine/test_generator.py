"""The generator: batches, pieces, stop tokens, teacher forcing, buckets, progress, dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_generator import (
    ATTENTIONS,
    GREEDY,
    MODEL,
    SAMPLED,
    make_params,
    make_prompts,
)
from wavejax import Generator, InputError
from wavejax.engine.generator import NO_TOKEN
from wavejax.engine.prompts import SMALLEST_BUCKET, bucket

# It says of users' programs which give the same tokens.
pytestmark = pytest.mark.optimised

# Two buckets; 262 and 318 share one, so that alone they share their programs. With 90 new tokens
# these two grow once, and the short prompt, all in its window at first, gets an index.
LENGTHS = (5, 262, 318)
NEW_TOKENS = 90
STOP = 12  # With seed 1, sampling meets it in one sequence at least, and not in all.


def make_generator(attention, sampler, stop_tokens=()):
    return Generator(MODEL, ATTENTIONS[attention], sampler, stop_tokens)


@functools.cache
def generate(generator, prompts, seed=0, pieces=None, sequences=None):
    """Streams `NEW_TOKENS` tokens, or decodes them in pieces of so many; returns `[steps, batch]`.

    Also the final logits and how many tokens each sequence then holds.
    """
    params = make_params()
    state = generator.start(params, prompts, NEW_TOKENS, seed, sequences=sequences)
    parts = []
    if pieces is None:
        for newest, tokens in generator.stream(params, state, NEW_TOKENS):
            state = newest
            parts.append(tokens)
    else:
        for steps in pieces:
            state, tokens = generator.decode_n(params, state, steps)
            parts.append(np.asarray(tokens))
    lengths = generator.attention.lengths(state.attention_state)
    return np.concatenate(parts), np.asarray(state.logits), np.asarray(lengths)


def check_alone(generator, prompts, chosen):
    """Whether the batch gives the chosen prompts the tokens and the length they get alone."""
    together, _, lengths = generate(generator, prompts, seed=1)
    assert len(together) == NEW_TOKENS
    for sequence in chosen:
        prompt, noise = (prompts[sequence],), (sequence,)
        alone, _, length = generate(generator, prompt, seed=1, sequences=noise)
        # A single sequence that stops ends its stream; in the batch it stays silent.
        np.testing.assert_array_equal(together[: len(alone), sequence], alone[:, 0])
        assert (together[len(alone) :, sequence] == NO_TOKEN).all()
        assert lengths[sequence] == length[0]


@pytest.mark.parametrize("attention", ["dense", pytest.param("wave", marks=pytest.mark.slow(50))])
def test_greedy_batch_gives_each_prompt_what_it_gets_alone(attention):
    # These two share their programs, alone.
    check_alone(make_generator(attention, GREEDY), make_prompts(LENGTHS), chosen=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_sampled_batch_gives_each_prompt_what_it_gets_alone(attention):
    # With a stop token: those that go on must not notice.
    generator = make_generator(attention, SAMPLED, (STOP,))
    check_alone(generator, make_prompts(LENGTHS), chosen=(0, 1, 2))


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_stop_tokens_end_a_sequence_and_no_other(attention):
    prompts = make_prompts(LENGTHS)
    generator = make_generator(attention, SAMPLED, (STOP,))
    tokens, _, lengths = generate(generator, prompts, seed=1)
    stopped = 0
    for sequence, prompt in enumerate(prompts):
        column = tokens[:, sequence]
        stops = np.flatnonzero(column == STOP)
        end = stops[0] + 1 if len(stops) else NEW_TOKENS
        assert ((column[:end] >= 0) & (column[:end] < MODEL.vocab_size)).all()
        assert (column[end:] == NO_TOKEN).all()
        # The stop token itself was drawn, and what was drawn after it is not kept: the sequence
        # stays as long as it was.
        assert lengths[sequence] == len(prompt) + end - (1 if len(stops) else 0)
        stopped += bool(len(stops))
    assert 0 < stopped < len(prompts), "the seed should make some stop and some go on"


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_pieces_one_call_and_the_stream_agree(attention):
    generator = make_generator(attention, GREEDY)
    prompts = make_prompts(LENGTHS)
    streamed, logits, lengths = generate(generator, prompts, seed=1)
    # Across the growth, which comes after 64 tokens.
    for pieces in [(NEW_TOKENS,), (5, *[8] * 10, 1, 3, 1)]:
        tokens, ends, held = generate(generator, prompts, seed=1, pieces=pieces)
        np.testing.assert_array_equal(tokens, streamed)
        np.testing.assert_array_equal(ends, logits)
        np.testing.assert_array_equal(held, lengths)


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_the_same_call_twice_gives_the_same(attention):
    generator = make_generator(attention, SAMPLED, (STOP,))
    prompts = make_prompts(LENGTHS)
    first = generate(generator, prompts, seed=1)
    again = generate.__wrapped__(generator, prompts, seed=1)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_gives_other_tokens():
    generator = make_generator("dense", SAMPLED, (STOP,))
    prompts = make_prompts(LENGTHS)
    first, other = (generate(generator, prompts, seed=seed)[0] for seed in (1, 2))
    assert not np.array_equal(first[:8], other[:8])


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_forced_tokens_come_from_the_logits_returned(attention):
    generator = make_generator(attention, GREEDY)
    prompts = make_prompts(LENGTHS)
    greedy, last, lengths = generate(generator, prompts, seed=1)
    state = generator.start(make_params(), prompts, NEW_TOKENS)
    state, logits = generator.force(make_params(), state, jnp.asarray(greedy))
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), greedy)
    np.testing.assert_allclose(state.logits, last, atol=1e-4)
    np.testing.assert_array_equal(generator.attention.lengths(state.attention_state), lengths)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_runs(dtype):
    generator = make_generator("wave", GREEDY)
    prompts = make_prompts(LENGTHS[1:2])
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    state = generator.start(params, prompts, NEW_TOKENS)
    exact = generator.start(make_params(), prompts, NEW_TOKENS)
    error = np.abs(np.asarray(state.logits - exact.logits))
    assert error.max() < 0.03 * float(jnp.abs(exact.logits).max())
    held = state.attention_state
    kept = [held.store.rows, held.steady.window, held.index.value_means]
    assert all(array.dtype == dtype for array in kept)
    state, tokens = generator.decode_n(params, state, 8)
    assert np.isfinite(state.logits).all()
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < MODEL.vocab_size)).all()


def test_facts_count_the_steps():
    generator = make_generator("wave", GREEDY)
    state = generator.start(make_params(), make_prompts(LENGTHS[1:2]), NEW_TOKENS)
    assert generator.facts(state).retrieved_share is None
    state, _ = generator.decode_n(make_params(), state, 5)
    facts = generator.facts(state)
    # 242 of the prompt's tokens are indexed; the floor of 8 is more than 0.9 % of them.
    assert facts.retrieved_share == pytest.approx(5 * 8 / sum(range(263, 268)))
    assert 0 <= facts.hit_ratio < 1


def test_facts_count_what_a_stopped_sequence_reads():
    generator = make_generator("wave", SAMPLED, (STOP,))
    prompts = make_prompts(LENGTHS)
    state = generator.start(make_params(), prompts, NEW_TOKENS, seed=1)
    stopped = state.finished | np.asarray([True, False, True])
    state = dataclasses.replace(state, finished=stopped)
    state, tokens = generator.decode_n(make_params(), state, 4)
    assert (np.asarray(tokens)[:, 1] != STOP).all()
    read = 4 * (6 + 319) + sum(range(263, 267))
    # The short prompt is all in its window.
    assert generator.facts(state).retrieved_share == pytest.approx(2 * 4 * 8 / read)


@pytest.mark.parametrize("lengths", [(3,), (5, 262, 318)])
def test_progress_rises_to_the_total(lengths):
    calls = []
    generator = make_generator("dense", GREEDY)
    generator.start(
        make_params(), make_prompts(lengths), NEW_TOKENS, progress=lambda *call: calls.append(call)
    )
    total = MODEL.num_layers * len(lengths)
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ((), "there is no prompt: give at least one"),
        (((1,), ()), "prompt 2 is empty: give at least one token"),
        (((1, 50),), "prompt 1 has token 50; the model has 0 to 49"),
        (((-1, 3),), "prompt 1 has token -1; the model has 0 to 49"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(InputError) as error:
        make_generator("dense", GREEDY).start(make_params(), prompts, 1)
    assert str(error.value) == message


@given(st.integers(1, 2**24))
def test_a_bucket_holds_its_prompt_with_a_quarter_to_spare(tokens):
    room = bucket(tokens)
    assert room >= tokens
    assert room == SMALLEST_BUCKET or room < 1.25 * tokens
    # A bucket's own size falls in it, and the sizes rise.
    assert bucket(room) == room <= bucket(tokens + 1)


def test_buckets_are_few():
    sizes = {bucket(tokens) for tokens in range(1, 2**15 + 1)}
    assert len(sizes) == 1 + 4 * 8  # four for each of the 8 doublings from 128 to 32768


@pytest.mark.parametrize("attention", ["dense", pytest.param("wave", marks=pytest.mark.slow(50))])
def test_a_sequence_ends_where_its_room_does(attention):
    """Asked for more than there is room for, a sequence stops: nothing it has read is lost."""
    params, prompts = make_params(), make_prompts((262,))
    generator = make_generator(attention, GREEDY)
    small = generator.start(params, prompts, 8)
    state, tokens = generator.decode_n(params, small, 300)
    tokens = np.asarray(tokens)[:, 0]
    count = int((tokens != NO_TOKEN).sum())
    assert 8 <= count < 300
    assert (tokens[count:] == NO_TOKEN).all()
    assert bool(state.finished[0])
    assert int(generator.attention.lengths(state.attention_state)[0]) == 262 + count
    large = generator.start(params, prompts, 300)
    _, expected = generator.decode_n(params, large, 300)
    np.testing.assert_array_equal(tokens[:count], np.asarray(expected)[:count, 0])
