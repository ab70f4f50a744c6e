"""The room that `Generator.start` makes: what fits in it, and what is refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pallas_kernels.build_clusters import capacity
from tests.support.tiny_generator import (
    ATTENTIONS,
    CONFIG,
    GREEDY,
    MODEL,
    make_params,
    make_prompts,
)
from wavejax import DenseAttention, Generator, InputError, WaveAttention
from wavejax.attention import wave
from wavejax.engine.prompts import SMALLEST_ROOM, answer_room, bucket, least_of_bucket
from wavejax.planning.memory import memory_need
from wavejax.store.shape import CacheShape
from wavejax.store.sizes import cluster_capacity, segment_sizes, sizes_of
from wavejax.store.state import Selection


def staged_or_not():
    wave = ATTENTIONS["wave"]
    return [ATTENTIONS["dense"], wave, dataclasses.replace(wave, store="host", fetch="staged")]


@pytest.mark.parametrize("attention", staged_or_not(), ids=["dense", "wave", "staged"])
def test_what_there_is_no_room_for_is_refused(attention):
    generator = Generator(MODEL, attention, GREEDY)
    params, prompts = make_params(), make_prompts((262, 90))
    state = generator.start(params, prompts, 8)
    cache = generator.engine.arrays_of(state.attention_state)
    left = np.asarray(attention.remaining(cache))
    assert (left >= 8).all()
    steps = int(left.min())
    with pytest.raises(InputError, match=f"{steps + 1} tokens are more than there is room for"):
        generator.force(params, state, jnp.zeros((steps + 1, 2), jnp.int32))
    # As many as there is room for fill it, to the token.
    state, logits = generator.force(params, state, jnp.zeros((steps, 2), jnp.int32))
    assert len(logits) == steps
    cache = generator.engine.arrays_of(state.attention_state)
    np.testing.assert_array_equal(attention.remaining(cache), left - steps)
    assert np.asarray(attention.is_full(cache)).tolist() == (left == steps).tolist()


@pytest.mark.parametrize("attention", staged_or_not(), ids=["dense", "wave", "staged"])
def test_no_steps_are_no_steps_and_fewer_are_refused(attention):
    generator = Generator(MODEL, attention, GREEDY)
    params, prompts = make_params(), make_prompts((20,))
    for settings, said in (
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        (
            {"max_new_tokens": 1, "seed": 2**31},
            "seed is 2147483648; it must be a whole number from",
        ),
    ):
        with pytest.raises(InputError, match=said):
            generator.start(params, prompts, **settings)
    state = generator.start(params, prompts, 8)
    with pytest.raises(InputError, match="steps is -1; it must be a whole number from 0 to"):
        generator.decode_n(params, state, -1)
    state, tokens = generator.decode_n(params, state, 0)
    assert tokens.shape == (0, 1)
    state, logits = generator.force(params, state, jnp.zeros((0, 1), jnp.int32))
    assert logits.shape == (0, 1, MODEL.vocab_size)


@given(st.integers(1, 2**24))
def test_an_answers_room_is_at_least_what_was_asked_for_and_a_quarter_more(tokens):
    room = answer_room(tokens)
    assert tokens <= room
    assert room == SMALLEST_ROOM or room < 1.25 * tokens
    assert answer_room(room) == room <= answer_room(tokens + 1)


def test_rooms_of_answers_are_few():
    assert answer_room(0) == 0
    sizes = {answer_room(tokens) for tokens in range(1, 2**15 + 1)}
    assert len(sizes) == 1 + 4 * 9  # four for each of the 9 doublings from 64 to 32768


@pytest.mark.parametrize("attention", staged_or_not(), ids=["dense", "wave", "staged"])
@pytest.mark.parametrize("asked", [1, 20, 63, 64, 65, 129, 150])
def test_the_room_made_is_the_room_planned_and_no_less_than_asked(attention, asked):
    """Also where a prompt leaves the window full, and an index must grow for the first token."""
    generator = Generator(MODEL, attention, GREEDY)
    lengths = (CONFIG.sink_tokens + CONFIG.window_tokens - 1, 128)
    state = generator.start(make_params(), make_prompts(lengths), asked)
    cache = generator.engine.arrays_of(state.attention_state)
    assert (np.asarray(attention.remaining(cache)) >= asked).all()
    sizes = 2, max(lengths), asked
    need = memory_need(MODEL, attention, *sizes, jnp.float32, shortest_prompt=min(lengths))
    facts = generator.facts(state)
    assert (need.state, need.host) == (facts.device_bytes, facts.host_bytes)
    if isinstance(attention, DenseAttention):
        assert cache.keys.shape[3] == bucket(max(lengths)) + answer_room(asked)


@pytest.mark.parametrize("name, value", [("store", "gpu"), ("fetch", "stagd")])
def test_an_attention_of_no_such_kind_is_refused(name, value):
    # Not by the class itself, whose arguments the tests' type checker sees first.
    fields = types.SimpleNamespace(**({"store": "host", "fetch": None} | {name: value}))
    with pytest.raises(InputError, match=f"`{name}` is '{value}'; it must be one of"):
        WaveAttention.__post_init__(fields)


# Where what is cut off clusters too large differs by segment, by one.
@example(prompt=66, other=129, growth=10, size=5, most=2, clusters=0, new=0, less=66)
@given(
    prompt=st.integers(1, 700),
    other=st.integers(1, 700),
    growth=st.integers(1, 40),
    size=st.integers(1, 70),
    most=st.integers(1, 3),
    clusters=st.integers(0, 30),
    new=st.integers(0, 90),
    less=st.integers(0, 700),
)
def test_there_are_clusters_enough_for_every_prompt_between_two_others(
    prompt, other, growth, size, most, clusters, new, less
):
    """A short prompt's are smaller, so there may be more of them than of the longest one's."""
    sizes = {"cluster_size": size, "max_cluster_size": most * size, "min_clusters": clusters}
    config = dataclasses.replace(CONFIG, growth_tokens=growth, **sizes)
    prompt, other = sorted((prompt, other))
    padded = segment_sizes(config, other)
    growths = -(-new // growth)
    room = cluster_capacity(config, padded, growths, max(0, prompt - less))
    own = [config.segment_tokens] * (prompt // config.segment_tokens)
    own += [prompt % config.segment_tokens]
    held = sum(capacity(count, *config.cluster_sizes(prompt)) for count in own)
    for nth in range(1, growths + 1):
        held += capacity(growth, *config.cluster_sizes(prompt + nth * growth))
    assert held <= room


# The most tokens that an int32 counts, of a step that begins past them.
@example(tokens=2**31 - 1, size=16, clusters=2**31 - 1)
@given(
    tokens=st.integers(0, 2**31 - 1),
    size=st.integers(1, 200),
    clusters=st.sampled_from([0, 1, 20, 3072, 2**31 - 1]),
)
def test_a_traced_number_of_tokens_has_the_same_clusters(tokens, size, clusters):
    sizes = {"cluster_size": size, "max_cluster_size": 3 * size, "min_clusters": clusters}
    config = dataclasses.replace(CONFIG, **sizes)
    found = sizes_of(config, jnp.int32(tokens))
    assert tuple(map(int, found)) == config.cluster_sizes(tokens)


def test_long_prompts_alone_need_no_room_for_short_ones_many_clusters():
    """At 122,880 tokens a shorter prompt may have 9,407 clusters, one of this bucket 5,760."""
    attention, sizes = WaveAttention(store="device"), (1, 122_880, 64, jnp.bfloat16)

    def clusters(**shortest):
        make = functools.partial(attention.init_state, CacheShape.of(MODEL), *sizes, **shortest)
        return jax.eval_shape(make).index.centroids.shape[3]

    least = least_of_bucket(122_880)
    growth = -(-attention.config.growth_tokens // 32) + attention.config.growth_tokens // 64
    indexed = attention.config.indexed_tokens(122_880)
    own = cluster_capacity(attention.config, segment_sizes(attention.config, indexed), 0, indexed)
    assert clusters(shortest_prompt=least) == own + growth == 5808
    assert clusters() == 9407


@given(st.integers(1, 2**20))
def test_the_least_prompt_of_a_bucket(tokens):
    least = least_of_bucket(tokens)
    assert bucket(least) == bucket(tokens)
    assert least == 1 or bucket(least - 1) < bucket(tokens)


def test_a_state_of_long_prompts_takes_no_shorter_ones():
    """Its tokens are those of a state that takes all."""
    config = dataclasses.replace(CONFIG, cluster_size=32, max_cluster_size=64, min_clusters=8)
    generator = Generator(MODEL, WaveAttention(config), GREEDY)
    params, prompts = make_params(), make_prompts((300, 290))
    state, roomy = generator.start(params, prompts, 80), generator.allocate(2, 300, 80)
    for slot, prompt in enumerate(prompts):
        roomy = generator.insert(params, roomy, slot, prompt)
    rooms = [one.attention_state.index.centroids.shape[3] for one in (state, roomy)]
    assert rooms[0] < rooms[1]
    (state, tokens), (_, same) = (generator.decode_n(params, one, 80) for one in (state, roomy))
    np.testing.assert_array_equal(tokens, same)
    state = generator.release(state, 0)
    with pytest.raises(InputError, match="prompts of 257 and more: give `allocate` a smaller"):
        generator.insert(params, state, 0, prompts[0][:256])
    generator.insert(params, state, 0, prompts[0][:257])
    made = generator.allocate(1, 300, 8, shortest_prompt=200)
    with pytest.raises(InputError, match="prompts of 193 and more"):
        generator.insert(params, made, 0, prompts[0][:192])
    with pytest.raises(InputError, match=r"shortest_prompt is 301; it must be .* from 1 to 300"):
        generator.allocate(1, 300, 8, shortest_prompt=301)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_state_that_has_room_for_shorter_prompts_takes_them(name):
    """Of one size of clusters, or without any: also where `start` knew of long prompts alone."""
    generator, params = Generator(MODEL, ATTENTIONS[name], GREEDY), make_params()
    long, short = make_prompts((300, 20))
    state = generator.release(generator.start(params, [long], 8), 0)
    assert int(state.shortest_prompt) == 1
    state = generator.insert(params, state, 0, short)
    (_, tokens), (_, alone) = (
        generator.decode_n(params, one, 8) for one in (state, generator.start(params, [short], 8))
    )
    np.testing.assert_array_equal(tokens, alone)


def test_a_sequence_grows_as_often_beside_a_longer_prompt_as_alone():
    attention = ATTENTIONS["wave"]
    alone, both = (
        attention.init_state(CacheShape.of(MODEL), batch, room, 100, jnp.float32)
        for batch, room in ((1, 256), (2, 1024))
    )
    lengths = jnp.array([250, 1000])
    for b in range(2):
        both = attention.finish_prefill(both, jnp.int32(b), lengths[b])
    alone = attention.finish_prefill(alone, jnp.int32(0), lengths[0])
    assert attention.remaining(both)[0] == attention.remaining(alone)[0]
    assert (np.asarray(attention.remaining(both)) >= 100).all()


def test_a_full_sequences_step_reads_its_window_and_no_more(monkeypatch):
    """The step's own row has no place there; past the window lie another head's rows."""
    attention = ATTENTIONS["wave"]
    state = attention.init_state(CacheShape.of(MODEL), 2, 128, 8, jnp.float32)
    most = CONFIG.window_tokens
    counts = jnp.array([most, most - 2], jnp.int32)
    state = dataclasses.replace(
        state, steady=dataclasses.replace(state.steady, window_tokens=counts)
    )
    read = []

    def look(query, steady, *rest, **settings):
        read.append(steady.window_tokens.tolist())
        raise InterruptedError

    monkeypatch.setattr(wave.ops, "attend_zones", look)
    nothing = Selection(*[jnp.zeros((1, 1, 1, 1))] * len(Selection._fields))
    with pytest.raises(InterruptedError):
        attention.attend(jnp.int32(0), nothing, state)
    assert read == [[most, most - 1]]
