"""The generator: batches, pieces, stop tokens, teacher forcing, buckets, progress, dtypes."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.build_clusters import capacity
from tests.wavejax.tiny_generator import (
    ATTENTIONS,
    CONFIG,
    GREEDY,
    MODEL,
    SAMPLED,
    make_params,
    make_prompts,
)
from wavejax import Generator, InputError, WaveAttention, index, wave_attention
from wavejax.generator import NO_TOKEN
from wavejax.index import cluster_capacity, segment_sizes
from wavejax.prompts import SMALLEST_BUCKET, bucket
from wavejax.wave_state import Selection

# It says of users' programs which give the same tokens.
pytestmark = pytest.mark.optimised

# Two buckets; 262 and 318 share one, so that alone they share their programs. With 90 new tokens
# these two grow once, and the short prompt, all in its window at first, gets an index.
LENGTHS = (5, 262, 318)
NEW_TOKENS = 90
STOP = 9  # With seed 1, sampling meets it in one sequence at least, and not in all.


def make_generator(attention, sampler, stop_tokens=()):
    return Generator(MODEL, ATTENTIONS[attention], sampler, stop_tokens)


@functools.cache
def generate(generator, prompts, seed=0, pieces=None):
    """Streams `NEW_TOKENS` tokens, or decodes them in pieces of so many; returns `[steps, batch]`.

    Also the final logits and how many tokens each sequence then holds.
    """
    params = make_params()
    state = generator.start(params, prompts, NEW_TOKENS, seed)
    parts = []
    if pieces is None:
        for newest, tokens in generator.stream(params, state, NEW_TOKENS):
            state = newest
            parts.append(tokens)
    else:
        for steps in pieces:
            state, tokens = generator.decode_n(params, state, steps)
            parts.append(np.asarray(tokens))
    lengths = generator.attention.lengths(state.cache)
    return np.concatenate(parts), np.asarray(state.logits), np.asarray(lengths)


def check_alone(generator, prompts, chosen):
    """Whether the batch gives the chosen prompts the tokens and the length they get alone."""
    together, _, lengths = generate(generator, prompts, seed=1)
    assert len(together) == NEW_TOKENS
    for sequence in chosen:
        alone, _, length = generate(generator, (prompts[sequence],), seed=1)
        # A single sequence that stops ends its stream; in the batch it stays silent.
        np.testing.assert_array_equal(together[: len(alone), sequence], alone[:, 0])
        assert (together[len(alone) :, sequence] == NO_TOKEN).all()
        assert lengths[sequence] == length[0]


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_greedy_batch_gives_each_prompt_what_it_gets_alone(attention):
    # These two share their programs, alone.
    check_alone(make_generator(attention, GREEDY), make_prompts(LENGTHS), chosen=(1, 2))


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
    np.testing.assert_array_equal(generator.attention.lengths(state.cache), lengths)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_runs(dtype):
    generator = make_generator("wave", GREEDY)
    prompts = make_prompts(LENGTHS[1:2])
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    state = generator.start(params, prompts, NEW_TOKENS)
    exact = generator.start(make_params(), prompts, NEW_TOKENS)
    error = np.abs(np.asarray(state.logits - exact.logits))
    assert error.max() < 0.03 * float(jnp.abs(exact.logits).max())
    kept = [state.cache.store.rows, state.cache.steady.window, state.cache.index.value_sums]
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


@pytest.mark.parametrize("attention", ["dense", "wave"])
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
    assert int(generator.attention.lengths(state.cache)[0]) == 262 + count
    large = generator.start(params, prompts, 300)
    _, expected = generator.decode_n(params, large, 300)
    np.testing.assert_array_equal(tokens[:count], np.asarray(expected)[:count, 0])


def staged_or_not():
    wave = ATTENTIONS["wave"]
    return [ATTENTIONS["dense"], wave, dataclasses.replace(wave, store="host", fetch="staged")]


@pytest.mark.parametrize("attention", staged_or_not(), ids=["dense", "wave", "staged"])
def test_what_there_is_no_room_for_is_refused(attention):
    generator = Generator(MODEL, attention, GREEDY)
    params, prompts = make_params(), make_prompts((262, 90))
    state = generator.start(params, prompts, 8)
    cache = state.cache.wave if generator.staged else state.cache
    left = np.asarray(attention.remaining(cache))
    assert (left >= 8).all()
    steps = int(left.min())
    with pytest.raises(InputError, match=f"{steps + 1} tokens are more than there is room for"):
        generator.force(params, state, jnp.zeros((steps + 1, 2), jnp.int32))
    # As many as there is room for fill it, to the token.
    state, logits = generator.force(params, state, jnp.zeros((steps, 2), jnp.int32))
    assert len(logits) == steps
    cache = state.cache.wave if generator.staged else state.cache
    np.testing.assert_array_equal(attention.remaining(cache), left - steps)
    assert np.asarray(attention.is_full(cache)).tolist() == (left == steps).tolist()


@pytest.mark.parametrize("attention", staged_or_not(), ids=["dense", "wave", "staged"])
def test_no_steps_are_no_steps_and_fewer_are_refused(attention):
    generator = Generator(MODEL, attention, GREEDY)
    params, prompts = make_params(), make_prompts((20,))
    for settings, said in (
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1, "seed": 2**31}, "seed is 2147483648; it must be from"),
    ):
        with pytest.raises(InputError, match=said):
            generator.start(params, prompts, **settings)
    state = generator.start(params, prompts, 8)
    with pytest.raises(InputError, match="steps is -1; it must be 0 or more"):
        generator.decode_n(params, state, -1)
    state, tokens = generator.decode_n(params, state, 0)
    assert tokens.shape == (0, 1)
    state, logits = generator.force(params, state, jnp.zeros((0, 1), jnp.int32))
    assert logits.shape == (0, 1, MODEL.vocab_size)


@pytest.mark.parametrize("name, value", [("store", "gpu"), ("fetch", "stagd")])
def test_an_attention_of_no_such_kind_is_refused(name, value):
    # Not by the class itself, whose arguments the tests' type checker sees first.
    fields = types.SimpleNamespace(**({"store": "host", "fetch": None} | {name: value}))
    with pytest.raises(InputError, match=f"{name} is '{value}'; it must be one of"):
        WaveAttention.__post_init__(fields)


@given(
    prompt=st.integers(1, 700),
    other=st.integers(1, 700),
    growth=st.integers(1, 40),
    size=st.integers(1, 9),
    new=st.integers(0, 90),
)
def test_there_are_clusters_enough_for_every_way_to_fill_the_room(prompt, other, growth, size, new):
    """A short prompt beside a long one may grow into the long one's room."""
    config = dataclasses.replace(
        CONFIG, growth_tokens=growth, cluster_size=size, max_cluster_size=2 * size
    )
    prompt, other = sorted((prompt, other))
    padded = segment_sizes(config, other)
    growths = -(-new // growth)
    tokens = sum(padded) + growths * growth
    room = cluster_capacity(config, padded, growths)
    own = [config.segment_tokens] * (prompt // config.segment_tokens)
    own += [prompt % config.segment_tokens]
    own += [growth] * ((tokens - prompt) // growth)
    sizes = config.cluster_sizes(tokens)
    assert sum(capacity(count, *sizes) for count in own) <= room


def test_a_full_sequences_step_reads_its_window_and_no_more(monkeypatch):
    """The step's own row has no place there; past the window lie another head's rows."""
    attention = ATTENTIONS["wave"]
    state = attention.init_state(MODEL, 2, 128, 8, jnp.float32)
    most = CONFIG.window_tokens
    counts = jnp.array([most, most - 2], jnp.int32)
    state = dataclasses.replace(
        state, steady=dataclasses.replace(state.steady, window_tokens=counts)
    )
    read = []

    def look(query, sink, sink_tokens, window, window_tokens, *rest, **settings):
        read.append(window_tokens.tolist())
        raise InterruptedError

    monkeypatch.setattr(wave_attention.ops, "attend_zones", look)
    with pytest.raises(InterruptedError):
        nothing = Selection(*[jnp.zeros((1, 1, 1, 1))] * len(Selection._fields))
        attention.attend(jnp.int32(0), nothing, state)
    assert read == [[most, most - 1]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_value_sums_are_finite_in_every_dtype(dtype):
    sums = jnp.array([1e6, -1e6, 3.0], jnp.float32)
    found = index._finite(sums, jnp.dtype(dtype))
    assert found.dtype == dtype
    most = min(1e6, float(jnp.finfo(dtype).max))
    np.testing.assert_allclose(found.astype(jnp.float32), [most, -most, 3.0], rtol=1e-2)
