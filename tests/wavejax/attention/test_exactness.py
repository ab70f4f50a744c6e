"""Wave attention equals full attention wherever it estimates nothing that it could get wrong."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.store.shape import CacheShape

# It runs longer than it compiles.
pytestmark = pytest.mark.optimised

STEPS = 1200


def compare(config, store, lengths, stream, model, steps=STEPS):
    """Largest difference to full attention over a prefill and `steps` decode steps."""
    outputs = {}
    start = jnp.asarray(lengths, jnp.int32)
    states = {}
    for attention in (DenseAttention(), WaveAttention(config, store)):
        state = attention.init_state(
            CacheShape.of(model), len(lengths), max(lengths), steps, jnp.float32
        )
        first, state = prefill(attention, state, stream, lengths)
        later, state = decode(attention, state, stream, start, steps)
        np.testing.assert_array_equal(attention.lengths(state), start + steps)
        outputs[type(attention)] = [*first, np.asarray(later)]
        states[type(attention)] = state
    pairs = zip(outputs[DenseAttention], outputs[WaveAttention], strict=True)
    return max(np.abs(dense - wave).max() for dense, wave in pairs), states[WaveAttention]


@pytest.mark.parametrize(
    ("store", "cache_fraction", "token_codes"),
    [pytest.param("host", 0.05, True, marks=pytest.mark.slow(30)), ("device", 1.0, False)],
)
def test_all_tokens_retrieved(store, cache_fraction, token_codes):
    """1,200 steps with growth, unequal lengths, a cache too small for what is retrieved."""
    model = model_of(kv_heads=2, group=7, head_dim=16)
    config = WaveConfig(
        retrieval_fraction=1.0,
        min_candidate_tokens=0,
        min_retrieved_tokens=0,
        growth_tokens=256,
        segment_tokens=512,
        cache_fraction=cache_fraction,
        token_codes=token_codes,
    )
    lengths = [700, 3, 1300]
    stream = random_stream(model, np.random.default_rng(0), max(lengths) + STEPS, len(lengths))
    error, state = compare(config, store, lengths, stream, model)
    assert error < 1e-5
    # Growth took place: what is left in the window is less than it holds.
    assert (np.asarray(state.index.tokens) > np.asarray(lengths)).all()


@pytest.mark.slow
def test_all_tokens_retrieved_with_the_default_growth():
    model = model_of(kv_heads=1, group=3, head_dim=32)
    config = WaveConfig(retrieval_fraction=1.0)
    lengths = [1500, 40]
    stream = random_stream(model, np.random.default_rng(1), max(lengths) + STEPS, len(lengths))
    error, state = compare(config, "device", lengths, stream, model)
    assert error < 1e-5
    assert state.index.tokens.tolist() == [1432 + 1024, 1024]


def test_all_clusters_estimated_whose_members_coincide():
    """Nothing retrieved: the estimate is exact where all of a cluster's keys are one key."""
    model = model_of(kv_heads=2, group=3, head_dim=16)
    config = WaveConfig(
        retrieval_fraction=0.0,
        min_candidate_tokens=0,
        min_retrieved_tokens=0,
        growth_tokens=256,
        segment_tokens=512,
        cluster_size=16,
    )
    lengths = [4 + 64 + 1024, 4 + 64 + 512]
    rng = np.random.default_rng(2)
    query, key, value = random_stream(model, rng, max(lengths) + STEPS, len(lengths))
    # Runs of 16 tokens share a key, in step with where k-means takes its first centroids.
    run = (np.arange(key.shape[1]) - 4) // 16 * 16 + 4
    run[:4] = np.arange(4)
    stream = (query, key[:, run], value)
    error, state = compare(config, "device", lengths, stream, model)
    assert error < 1e-5
    assert int(state.cache.table.hits.sum() + state.cache.table.misses.sum()) == 0
    assert (np.asarray(state.index.tokens) >= 1024).all()


def test_a_prompt_shorter_than_the_steady_zone():
    model = model_of()
    stream = random_stream(model, np.random.default_rng(3), 40, 2)
    error, state = compare(WaveConfig(), "host", [1, 7], stream, model, steps=20)
    assert error < 1e-5
    assert state.index.tokens.tolist() == [0, 0]


@pytest.mark.slow
def test_estimation_matters():
    """The comparison can fail: with few tokens retrieved the outputs differ, and less so with the
    rest estimated than with the rest dropped."""
    model = model_of(kv_heads=2, group=2, head_dim=16)
    config = WaveConfig(
        retrieval_fraction=0.05,
        min_candidate_tokens=0,
        min_retrieved_tokens=0,
        growth_tokens=256,
        segment_tokens=512,
    )
    stream = random_stream(model, np.random.default_rng(4), 1400, 1)
    estimated, _ = compare(config, "device", [1300], stream, model, steps=50)
    dropped, _ = compare(
        dataclasses.replace(config, estimation_fraction=0.0), "device", [1300], stream, model, 50
    )
    assert 1e-3 < estimated < dropped


@pytest.mark.slow(25)
def test_a_sequence_may_be_replaced_by_another():
    """A prefill into a used place leaves nothing of what was there."""
    model = model_of()
    config = WaveConfig(retrieval_fraction=1.0, growth_tokens=128, segment_tokens=256)
    rng = np.random.default_rng(5)
    old, new = random_stream(model, rng, 900, 1), random_stream(model, rng, 900, 1)
    attention, dense = WaveAttention(config, "device"), DenseAttention()
    state = attention.init_state(CacheShape.of(model), 1, 700, 200, jnp.float32)
    _, state = prefill(attention, state, old, [700])
    _, state = decode(attention, state, old, jnp.array([700]), 200)
    _, state = prefill(attention, state, new, [300], room=700)
    found, _ = decode(attention, state, new, jnp.array([300]), 200)
    state = dense.init_state(CacheShape.of(model), 1, 700, 200, jnp.float32)
    _, state = prefill(dense, state, new, [300], room=700)
    expected, _ = decode(dense, state, new, jnp.array([300]), 200)
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5
