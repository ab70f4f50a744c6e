"""Clusters ranked by what their members might reach: tokens are found that their means hide."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig
from wavejax.attention import retrieval
from wavejax.store.shape import CacheShape

MODEL = model_of(kv_heads=2, group=2, head_dim=64)
SIZES = {
    "sink_tokens": 2, "local_tokens": 8, "growth_tokens": 64, "segment_tokens": 256,
    "cluster_size": 16, "max_cluster_size": 32, "min_clusters": 0, "min_candidate_tokens": 64,
    "candidate_fraction": 0.125, "min_retrieved_tokens": 16,
}  # fmt: skip
LENGTHS, STEPS = [700, 5, 300], 100


@pytest.fixture(scope="module")
def stream():
    return random_stream(MODEL, np.random.default_rng(1), max(LENGTHS) + STEPS, len(LENGTHS))


def run(attention, stream, steps=STEPS):
    state = attention.init_state(CacheShape.of(MODEL), len(LENGTHS), max(LENGTHS), STEPS, "float32")
    _, state = prefill(attention, state, stream, LENGTHS)
    return decode(attention, state, stream, jnp.asarray(LENGTHS, jnp.int32), steps)


def test_deviations_are_those_of_the_keys(stream):
    """Of prompts and of growth, against the keys' own in float64: within what codes tell."""
    _, state = run(WaveAttention(WaveConfig(reach=1.0, **SIZES), "device"), stream)
    index, ratios = state.index, []
    assert (np.asarray(index.tokens) > np.asarray(index.prompt_tokens)).all()
    keys = np.asarray(state.store.rows.data[0, :, :, :, 0], np.float64)
    ids, prompt = np.asarray(index.token_ids[0]), np.asarray(index.prompt_tokens)
    offsets, said = np.asarray(index.offsets[0]), np.asarray(index.deviations[0])
    for b, h in np.ndindex(len(LENGTHS), 2):
        place = np.arange(offsets[b, h, -1])
        grown = prompt[b] + (place - prompt[b]) // 64 * 64
        row = np.where(place < prompt[b], place // 256 * 256, grown) + ids[b, h, place]
        for c in range(int(index.num_clusters[0, b, h])):
            members = keys[b, h, row[offsets[b, h, c] : offsets[b, h, c + 1]]]
            square = np.mean(np.sum((members - members.mean(0)) ** 2, -1)) / 64
            if len(members) == 1:
                assert said[b, h, c] < 1e-3
            else:
                ratios.append(said[b, h, c] / np.sqrt(square))
    assert np.quantile(ratios, [0, 0.5, 1]) == pytest.approx(1, rel=0.2)
    assert np.median(ratios) == pytest.approx(1, rel=0.03)


def test_candidates_are_the_clusters_of_most_reached_mass(stream):
    """Against the index's own arrays, in float64."""
    config = WaveConfig(reach=2.0, **SIZES)
    attention = WaveAttention(config, "device")
    state = attention.init_state(CacheShape.of(MODEL), len(LENGTHS), max(LENGTHS), STEPS, "float32")
    _, state = prefill(attention, state, stream, LENGTHS)
    query = stream[0][jnp.arange(3), jnp.asarray(LENGTHS)].reshape(3, 2, 2, 64)
    index, layer, scale = state.index, jnp.int32(0), 1 / 8
    scores = retrieval.score_clusters(query, index, layer, scale=scale)
    chosen = retrieval.select_clusters(config, query, scores, index, layer, scale=scale)
    differ = 0
    for b, h in np.ndindex(3, 2):
        q = np.asarray(query[b, h], np.float64)
        means = scale * q @ np.asarray(index.centroids[0, b, h], np.float64).T
        length = np.linalg.norm(q, axis=-1)[:, None]
        reached = means + 2 * scale * length * np.asarray(index.deviations[0, b, h], np.float64)
        sizes = np.diff(np.asarray(index.offsets[0, b, h]))
        if not sizes.sum():
            continue
        # Each head's masses are shares of all its clusters'.
        total = np.log((np.exp(means) * sizes).sum(-1, keepdims=True))
        taken = np.asarray(chosen.selected[b, h])
        for logits, counts in ((reached, True), (means, False)):
            mass = np.exp(logits - total).sum(0)
            order = [c for c in np.argsort(-mass, kind="stable") if sizes[c]]
            before = np.cumsum([0, *sizes[order]])[:-1]
            expected = np.sort(np.asarray(order)[before < max(64, int(0.125 * sizes.sum()))])
            if counts:
                np.testing.assert_array_equal(np.flatnonzero(taken), expected)
            else:
                differ += not np.array_equal(np.flatnonzero(taken), expected)
    assert differ > 2


def test_where_all_is_retrieved_it_is_full_attention(stream):
    config = WaveConfig(reach=2.0, **SIZES | {"min_retrieved_tokens": 2000})
    np.testing.assert_allclose(
        run(WaveAttention(config, "host"), stream)[0], run(DenseAttention(), stream)[0], atol=1e-5
    )


def test_without_codes_it_is_refused():
    with pytest.raises(InputError, match="give `token_codes=True`"):
        WaveConfig(reach=1.0, token_codes=False)
    with pytest.raises(InputError, match="reach"):
        WaveConfig(reach=-1.0)
