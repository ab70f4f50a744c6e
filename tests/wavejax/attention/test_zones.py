"""Every token counts in exactly one zone, at every step, in every head."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from pallas_kernels.types import NO_ID
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import WaveAttention, WaveConfig
from wavejax.attention import retrieval
from wavejax.store.shape import CacheShape

MODEL = model_of(kv_heads=2, group=3, head_dim=16)


@functools.partial(jax.jit, static_argnums=0)
def zones(attention, query, state):
    """What a decode step of layer 0 retrieves, and what of each cluster it estimates."""
    index, layer = state.index, jnp.int32(0)
    scores = ops.score_clusters(query, index.centroids, index.offsets, layer, scale=0.25)
    found = attention.retrieve(layer, query, scores, state)
    return found, retrieval.to_estimate(attention.config, scores, found, index, layer)


def members_of(index, b, h):
    """The indexed tokens of each cluster, from the index's arrays alone."""
    offsets = np.asarray(index.offsets[0, b, h])
    ids = np.asarray(index.token_ids[0, b, h]).astype(int)
    prompt, total = int(index.prompt_tokens[b]), int(index.tokens[b])
    starts = np.arange(len(ids))
    in_prompt = starts // CONFIG["segment_tokens"] * CONFIG["segment_tokens"]
    in_growth = prompt + (starts - prompt) // CONFIG["growth_tokens"] * CONFIG["growth_tokens"]
    tokens = ids + np.where(starts < prompt, in_prompt, in_growth)
    assert offsets[-1] == total
    return [tokens[a:b] for a, b in itertools.pairwise(offsets)]


CONFIG = {"segment_tokens": 128, "growth_tokens": 64, "local_tokens": 16}


# Share of the tokens retrieved, least number of them, token codes. Few: each compiles anew.
BUDGETS = [(0.03, 10, True), (0.3, 0, False), (1.0, 0, True)]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=2, max_size=2),
    chunks=st.integers(0, 3),
    budget=st.sampled_from(BUDGETS),
    seed=st.integers(0, 1000),
)
def test_zones_partition_the_tokens(lengths, chunks, budget, seed):
    retrieval_fraction, min_retrieved, token_codes = budget
    config = WaveConfig(
        retrieval_fraction=retrieval_fraction,
        min_candidate_tokens=4 * min_retrieved,
        min_retrieved_tokens=min_retrieved,
        token_codes=token_codes,
        cluster_size=8,
        max_cluster_size=16,
        **CONFIG,
    )
    attention = WaveAttention(config, "device")
    stream = random_stream(MODEL, np.random.default_rng(seed), 600, 2)
    # One room for all lengths and counts of steps, so that little is compiled.
    state = attention.init_state(CacheShape.of(MODEL), 2, 400, 150, jnp.float32)
    _, state = prefill(attention, state, stream, lengths, room=400)
    start = jnp.asarray(lengths, jnp.int32)
    for _ in range(chunks):
        _, state = decode(attention, state, stream, start, 50)
        start = start + 50
    query = stream[0][jnp.arange(2), start].reshape(2, 2, 3, 16)
    retrieved, remaining = zones(attention, query, state)
    index, remaining = state.index, np.asarray(remaining)
    for b in range(2):
        indexed = int(index.tokens[b])
        steady = int(state.steady.sink_tokens[b] + state.steady.window_tokens[b])
        assert steady + indexed == start[b]
        assert int(state.steady.window_tokens[b]) < config.window_tokens
        budget = max(min_retrieved, math.ceil(round(retrieval_fraction * indexed, 6)))
        for h in range(2):
            members = members_of(index, b, h)
            assert sorted(np.concatenate(members)) == list(range(indexed))
            tokens = np.asarray(retrieved.tokens[b, h])
            tokens = tokens[tokens != NO_ID].tolist()
            assert len(set(tokens)) == len(tokens) == min(budget, indexed)
            # What a cluster keeps is what was not retrieved of it: each token counts once.
            for j, own in enumerate(members):
                assert remaining[b, h, j] == len(own) - len(set(own) & set(tokens))
            assert len(tokens) + remaining[b, h].sum() == indexed


def test_without_estimation_the_rest_counts_nowhere():
    config = WaveConfig(
        estimation_fraction=0.0, min_retrieved_tokens=64, min_candidate_tokens=256, **CONFIG
    )
    attention = WaveAttention(config, "device")
    state = attention.init_state(CacheShape.of(MODEL), 1, 300, 10, jnp.float32)
    stream = random_stream(MODEL, np.random.default_rng(0), 310, 1)
    _, state = prefill(attention, state, stream, [300])
    query = stream[0][:, 300].reshape(1, 2, 3, 16)
    retrieved, estimated = zones(attention, query, state)
    assert int(jnp.sum(retrieved.remaining)) > 0
    np.testing.assert_array_equal(estimated, 0)


def test_the_papers_settings_estimate_a_share_of_the_clusters():
    config = WaveConfig.paper(segment_tokens=1024)
    attention = WaveAttention(config, "device")
    model = model_of(kv_heads=1, group=2, head_dim=16)
    state = attention.init_state(CacheShape.of(model), 1, 2400, 10, jnp.float32)
    stream = random_stream(model, np.random.default_rng(0), 2410, 1)
    _, state = prefill(attention, state, stream, [2400])
    query = stream[0][:, 2400].reshape(1, 1, 2, 16)
    retrieved, estimated = zones(attention, query, state)
    indexed = 2400 - 68
    assert int((retrieved.tokens != NO_ID).sum()) == int(np.ceil(0.018 * indexed))
    # Whole clusters: up to one cluster more than the share.
    largest = int(jnp.diff(state.index.offsets[0, 0, 0]).max())
    assert 0.232 * indexed <= int(estimated.sum()) <= 0.232 * indexed + largest + 2
