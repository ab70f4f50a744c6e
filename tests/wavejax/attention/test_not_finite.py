"""Wave attention of what is not finite, or too large for float16's sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import Rows
from tests.support import attention_harness as harness
from tests.wavejax.attention.test_causal_attention import plain
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.causal import causal_attention
from wavejax.attention.dense import DenseState
from wavejax.store.shape import CacheShape

CONFIG = WaveConfig(
    sink_tokens=4,
    local_tokens=8,
    growth_tokens=16,
    segment_tokens=32,
    cluster_size=4,
    max_cluster_size=8,
    min_clusters=0,
    retrieval_fraction=0.3,
    min_candidate_tokens=0,
    min_retrieved_tokens=0,
)
MODEL = harness.model_of()
LENGTHS, STEPS = (75, 90), 20  # both grow


def attentions():
    small = dataclasses.replace(CONFIG, retrieval_fraction=0.0)
    return {
        "device": WaveAttention(CONFIG, "device"),
        "host": WaveAttention(CONFIG, "host"),
        "estimated": WaveAttention(small, "device"),
        "whole clusters": WaveAttention(dataclasses.replace(CONFIG, token_codes=False), "device"),
        "full": DenseAttention(),
    }


@functools.cache
def stream():
    return harness.random_stream(MODEL, np.random.default_rng(5), 120, batch=2)


def run(attention, key, value):
    given = stream()[0], key, value
    state = attention.init_state(CacheShape.of(MODEL), 2, max(LENGTHS), STEPS, jnp.float32)
    read, state = harness.prefill(attention, state, given, LENGTHS)
    outputs, _ = harness.decode(attention, state, given, jnp.array(LENGTHS), STEPS)
    return read, np.asarray(outputs)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("name", attentions())
def test_nan_reaches_what_attends_to_it_and_nothing_else(name, kind):
    attention = attentions()[name]
    _, key, value = stream()
    read, clean = run(attention, key, value)
    assert np.isfinite(clean).all()
    # A sink, an indexed token, one that growth indexes, and one of the window.
    for token in (1, 40, 85, 88):
        spoilt = {"key": key, "value": value}
        spoilt[kind] = spoilt[kind].at[1, token, 0, 3].set(jnp.nan)
        read_now, found = run(attention, spoilt["key"], spoilt["value"])
        # Two query heads share the kv head, and attend to the token from its own position on.
        own = read_now[1][:, :2]
        assert np.isnan(own[token:]).any(axis=-1).all()
        np.testing.assert_array_equal(own[:token], read[1][:token, :2])
        np.testing.assert_array_equal(read_now[1][:, 2:], read[1][:, 2:])
        assert np.isnan(found[:, 1, :2]).any(axis=-1).all(), (token, name)
        np.testing.assert_array_equal(found[:, 1, 2:], clean[:, 1, 2:])
        np.testing.assert_array_equal(found[:, 0], clean[:, 0])
        np.testing.assert_array_equal(read_now[0], read[0])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_prompt_s_earlier_tokens_do_not_see_a_bad_value(bad):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(300, heads, 16)), jnp.float32) for heads in (4, 2, 2)
    )
    expected = plain(query, key, value, 0.25)
    found = jax.jit(lambda *x: causal_attention(*x, scale=0.25))(
        query, key, value.at[200, 1, 3].set(bad)
    )
    np.testing.assert_allclose(found[:200], expected[:200], atol=1e-5)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-5)
    assert np.isnan(found[200:, 2:, 3]).all()


@pytest.mark.parametrize("heads_seen", [1, 2])
def test_what_full_attention_does_not_see_does_not_reach_it(heads_seen):
    """Unseen keys and values of NaN change no bit, whether the heads see the same or not."""
    attention, tokens = DenseAttention(), 12
    query, key, value = (x[:1, :tokens] for x in stream())
    state = attention.init_state(CacheShape.of(MODEL), 1, tokens, 0, jnp.float32)
    _, state = harness.prefill(attention, state, (query, key, value), [tokens])
    seen = jnp.asarray(np.random.default_rng(0).random((1, heads_seen, tokens)) < 0.5)

    def attend(state):
        return np.asarray(attention.attend(jnp.int32(0), query[:, -1:], state, seen))

    unseen = ~seen[None, ..., None]
    keys, values = (
        Rows(jnp.where(unseen, jnp.nan, rows.data)) for rows in (state.keys, state.values)
    )
    spoilt = DenseState(keys, values, state.tokens)
    assert np.isnan(spoilt.values.data).any()
    np.testing.assert_array_equal(attend(spoilt), attend(state))
    assert np.isfinite(attend(spoilt)).all()


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_large_values_are_estimated_as_in_float64(dtype, tolerance):
    """Sums of 64 values of some 3000 pass what float16 holds; their means do not."""
    config = dataclasses.replace(
        CONFIG, segment_tokens=512, cluster_size=64, max_cluster_size=128, retrieval_fraction=0.0
    )
    attention, tokens = WaveAttention(config, "device"), 500
    query, key, value = harness.random_stream(MODEL, np.random.default_rng(7), tokens + 1, batch=1)
    value = 3000 + 100 * value
    # All keys are the same, so that the estimate is exact: all tokens weigh the same.
    key = jnp.broadcast_to(key[:, :1], key.shape)
    given = tuple(x.astype(dtype) for x in (query, key, value))
    state = attention.init_state(CacheShape.of(MODEL), 1, tokens, 1, jnp.dtype(dtype))
    _, state = harness.prefill(attention, state, given, [tokens])
    outputs, _ = harness.decode(attention, state, given, jnp.array([tokens]), 1)
    mean = np.asarray(given[2], np.float64)[0].mean(0)
    expected = np.repeat(mean, 2, axis=0)
    error = np.abs(np.asarray(outputs, np.float64)[0, 0] - expected).max()
    assert error <= tolerance * 3000
