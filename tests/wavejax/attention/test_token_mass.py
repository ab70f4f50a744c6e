"""`min_token_mass`: only tokens of enough mass are retrieved."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.types import NO_ID
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention import retrieval
from wavejax.attention.wave import scale_of
from wavejax.evaluation.ablations import AblatedAttention
from wavejax.store.shape import CacheShape

HEADS, GROUP, DIM = 2, 3, 32
MODEL = model_of(kv_heads=HEADS, group=GROUP, head_dim=DIM)
CONFIG = WaveConfig(
    sink_tokens=4,
    local_tokens=16,
    growth_tokens=64,
    segment_tokens=256,
    cluster_size=8,
    max_cluster_size=16,
    candidate_fraction=1.0,
    min_candidate_tokens=0,
    min_retrieved_tokens=200,
)
LENGTHS = [700, 450]


def with_mass(mass, **changes):
    return WaveAttention(dataclasses.replace(CONFIG, min_token_mass=mass, **changes), "device")


def started(attention, stream, steps=10):
    state = attention.init_state(
        CacheShape.of(MODEL), len(LENGTHS), max(LENGTHS), steps, jnp.float32
    )
    return prefill(attention, state, stream, LENGTHS)[1]


@pytest.fixture
def stream():
    return random_stream(MODEL, np.random.default_rng(3), max(LENGTHS) + 10, len(LENGTHS))


def next_token(stream):
    """The query, key and value of the first step, each `[batch, 1, heads, head_dim]`."""
    batch = jnp.arange(len(LENGTHS))
    return tuple(x[batch, jnp.asarray(LENGTHS)][:, None] for x in stream)


def retrieved_tokens(attention, stream):
    """The rows retrieved in the first step: a set for each sequence and kv head."""
    state = started(attention, stream)
    selection, _ = attention.select(jnp.int32(0), *next_token(stream), state)
    tokens = np.asarray(selection.tokens)
    return [[set(row[row != NO_ID].tolist()) for row in rows] for rows in tokens]


@pytest.mark.slow
def test_the_tokens_of_enough_mass_are_retrieved_and_no_others(stream):
    """Planted tokens, another number for each kv head, with a fifth of a head's mass and more each,
    where the others have less than a hundredth. Each token is its own cluster: masses are exact."""
    query, key, value = stream
    batch = jnp.arange(len(LENGTHS))
    # The heads of a group ask nearly the same.
    first = query[batch, jnp.asarray(LENGTHS)].reshape(len(LENGTHS), HEADS, GROUP, DIM)[:, :, :1]
    near = first + 0.05 * jnp.cos(jnp.arange(GROUP * DIM).reshape(GROUP, DIM))
    query = query.at[batch, jnp.asarray(LENGTHS)].set(near.reshape(len(LENGTHS), -1, DIM))
    toward = first[:, :, 0] / jnp.sum(jnp.square(first[:, :, 0]), axis=-1, keepdims=True)
    planted = {0: (30, 200, 201, 333, 420), 1: (77, 150)}
    for h, tokens in planted.items():
        for token in tokens:
            key = key.at[:, token, h].set(12 * DIM**0.5 * toward[:, h])
    found = retrieved_tokens(
        with_mass(0.02, cluster_size=1, max_cluster_size=1), (query, key, value)
    )
    # Rows are counted from after the sinks.
    expected = [[{token - 4 for token in planted[h]} for h in range(HEADS)]] * len(LENGTHS)
    assert found == expected


@pytest.mark.parametrize("sinks", [0, 4])
def test_masses_are_shares_of_all_tokens(stream, sinks):
    """The steady zone counted exactly, the step's own token included, the index by its clusters."""
    attention = with_mass(0.5, sink_tokens=sinks)
    state = started(attention, stream)
    query, key, value = next_token(stream)
    _, new = attention.select(jnp.int32(0), query, key, value, state)
    grouped = query.reshape(len(LENGTHS), HEADS, GROUP, DIM)
    scale, index = scale_of(query), state.index
    scores = ops.score_clusters(grouped, index.centroids, index.offsets, jnp.int32(0), scale=scale)
    found = retrieval.of_all_tokens(scores, grouped, new.steady, jnp.int32(0), scale=scale)
    np.testing.assert_array_equal(found.logits, scores.logits)
    sizes = np.diff(np.asarray(index.offsets[0], np.float64), axis=-1)
    for b, length in enumerate(LENGTHS):
        steady = [*range(sinks), *range(length - 16, length + 1)]
        keys = np.asarray(stream[1][b, jnp.asarray(steady)], np.float64)
        for h in range(HEADS):
            q = np.asarray(grouped[b, h], np.float64)
            steady_mass = np.exp(scale * q @ keys[:, h].T).sum(-1)
            centroids = np.asarray(index.centroids[0, b, h], np.float64)
            clusters = (sizes[b, h] * np.exp(scale * q @ centroids.T)).sum(-1)
            np.testing.assert_allclose(
                found.logsumexp[b, h], np.log(steady_mass + clusters), rtol=1e-5
            )


@pytest.mark.slow
def test_the_less_the_mass_the_more_is_retrieved_up_to_the_budget(stream):
    steps, lengths = 5, jnp.asarray(LENGTHS)
    full, _ = decode(DenseAttention(), started(DenseAttention(), stream), stream, lengths, steps)
    rows, errors = [], []
    for mass in (1.0, 2e-2, 8e-3, 1e-9):
        attention = with_mass(mass)
        output, state = decode(attention, started(attention, stream), stream, lengths, steps)
        cache = state.cache
        rows.append(int(jnp.sum(cache.table.hits + cache.table.misses)))
        errors.append(float(jnp.linalg.norm(output - full)))
    assert rows[0] == 0
    assert rows == sorted(set(rows))
    assert rows[-1] == CONFIG.min_retrieved_tokens * len(LENGTHS) * HEADS * steps
    assert errors == sorted(errors, reverse=True)


def test_an_ablation_has_none():
    with pytest.raises(InputError, match="min_token_mass"):
        AblatedAttention(dataclasses.replace(CONFIG, min_token_mass=0.1), "device")
