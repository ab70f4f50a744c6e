"""The index's covariance is the first segment's, of a prompt or of growth, and stays."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, prefill
from tests.wavejax.store.test_moments import MODEL, SIZES, grown_state, members
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig
from wavejax.store.index import clear
from wavejax.store.shape import CacheShape

CONFIG = WaveConfig(pooled_covariance=True, **SIZES)


def expected_of(index, b, h, keys, values, tokens):
    """Both matrices of the clusters within so many of the first indexed tokens, in float64."""
    pair, trace = np.zeros((2, 16, 16)), 0.0
    for own in members(index, b, h):
        if own.max() >= tokens:
            continue
        d, e = (np.asarray(x[b, SIZES["sink_tokens"] + own, h], np.float64) for x in (keys, values))
        d, e = d - d.mean(0), e - e.mean(0)
        pair += d.T @ d, e.T @ d
        trace += np.sum(d**2)
    return pair * 16 / trace


def test_it_is_of_the_first_segments_members():
    """Of a prompt of more segments than one, and of one that has no index before it grows."""
    state, (keys, values) = grown_state(CONFIG, [290, 3], 200)
    index = state.index
    assert (np.asarray(index.tokens) > np.asarray(index.prompt_tokens)).all()
    assert int(index.prompt_tokens[0]) > SIZES["segment_tokens"]
    assert int(index.prompt_tokens[1]) == 0
    first = SIZES["segment_tokens"], SIZES["growth_tokens"]
    for b, h in itertools.product(range(2), range(2)):
        expected = expected_of(index, b, h, keys, values, first[b])
        found = np.asarray(index.covariance[0, b, h], np.float64)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert np.trace(found[0]) == pytest.approx(16, rel=1e-4)


def test_another_prompt_in_the_slot_has_its_own():
    state, _ = grown_state(CONFIG, [290, 3], 10)
    before = np.asarray(state.index.covariance)
    index = clear(state.index, jnp.int32(0), jnp.int32(0))
    attention, (other, (keys, values)) = (
        WaveAttention(CONFIG, "device"),
        grown_state(CONFIG, [200, 3], 10),
    )
    stream = (np.zeros_like(keys), keys, values)
    state = dataclasses.replace(state, index=index)
    _, state = prefill(attention, state, stream, [200, 3], room=300)
    found = np.asarray(state.index.covariance)
    np.testing.assert_array_equal(found[0, 0], np.asarray(other.index.covariance)[0, 0])
    assert np.abs(found[0, 0] - before[0, 0]).max() > 0.01


def test_keys_all_alike_have_none():
    """No direction to be told, and nothing to divide by."""
    attention = WaveAttention(CONFIG, "device")
    stream = tuple(np.ones((1, 260, heads, 16), np.float32) for heads in (2, 2, 2))
    state = attention.init_state(CacheShape.of(MODEL), 1, 250, 10, jnp.float32)
    _, state = prefill(attention, state, stream, [250], room=250)
    assert np.isfinite(np.asarray(state.index.covariance)).all()
    output, _ = decode(attention, state, stream, jnp.asarray([250], jnp.int32), 2)
    np.testing.assert_allclose(output, 1, rtol=1e-5)


def test_it_brings_the_output_nearer():
    """Keys and values of one linear map, in clusters of one shape: most of the error goes."""
    rng = np.random.default_rng(3)
    tokens, lengths = 600, [580]
    shape = rng.normal(size=(16, 16)) * np.linspace(0.1, 1.2, 16)[:, None]
    residual = rng.normal(size=(1, tokens, 2, 16)) @ shape
    centres = 3 * rng.normal(size=(24, 2, 2, 16))
    own = rng.integers(0, 24, tokens)
    keys = residual + centres[own, 0][None]
    values = residual @ rng.normal(size=(16, 16)) / 2 + centres[own, 1][None]
    query = rng.normal(size=(1, tokens, 2, 16)) / 3
    stream = tuple(np.asarray(x, np.float32) for x in (query, keys, values))

    def run(attention):
        state = attention.init_state(CacheShape.of(MODEL), 1, 590, 10, jnp.float32)
        _, state = prefill(attention, state, stream, lengths, room=590)
        return decode(attention, state, stream, jnp.asarray(lengths, jnp.int32), 10)[0]

    sizes = SIZES | {"segment_tokens": 512, "cluster_size": 16, "max_cluster_size": 32}
    full, error = run(DenseAttention()), {}
    for pooled in (False, True):
        config = WaveConfig(pooled_covariance=pooled, **sizes)
        found = run(WaveAttention(config, "device"))
        error[pooled] = np.linalg.norm(found - full) / np.linalg.norm(full)
    assert error[True] < 0.6 * error[False]


@pytest.mark.parametrize(
    "settings, match",
    [({"moment_rank": 2}, "two corrections"), ({"token_codes": False}, "token_codes=True")],
)
def test_what_it_does_not_go_with_is_refused(settings, match):
    with pytest.raises(InputError, match=match):
        WaveConfig(pooled_covariance=True, **settings)
