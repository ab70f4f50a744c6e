"""The index's moments are those of each cluster's members, of a prompt and of growth alike."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import WaveAttention, WaveConfig
from wavejax.store.shape import CacheShape

MODEL = model_of(kv_heads=2, group=1, head_dim=16)
SIZES = {
    "sink_tokens": 2, "local_tokens": 8, "growth_tokens": 64, "segment_tokens": 128,
    "cluster_size": 8, "max_cluster_size": 16, "min_retrieved_tokens": 8,
    "min_candidate_tokens": 32,
}  # fmt: skip


def grown_state(config, lengths, steps):
    """A state whose sequences have grown, and their keys and values."""
    attention = WaveAttention(config, "device")
    stream = random_stream(MODEL, np.random.default_rng(0), max(lengths) + steps, len(lengths))
    state = attention.init_state(CacheShape.of(MODEL), len(lengths), 300, steps, jnp.float32)
    _, state = prefill(attention, state, stream, lengths, room=300)
    _, state = decode(attention, state, stream, jnp.asarray(lengths, jnp.int32), steps)
    return state, stream[1:]


def members(index, b, h):
    """The store rows of each cluster's members."""
    offsets, ids = np.asarray(index.offsets[0, b, h]), np.asarray(index.token_ids[0, b, h])
    prompt, place = int(index.prompt_tokens[b]), np.arange(ids.shape[0])
    grown = prompt + (place - prompt) // SIZES["growth_tokens"] * SIZES["growth_tokens"]
    in_prompt = place // SIZES["segment_tokens"] * SIZES["segment_tokens"]
    rows = ids + np.where(place < prompt, in_prompt, grown)
    return [rows[first:end] for first, end in itertools.pairwise(offsets) if end > first]


@pytest.mark.parametrize(
    ("rank", "dtype"), [pytest.param(2, "model", marks=pytest.mark.slow), (4, "int8")]
)
def test_moments_are_of_each_clusters_members(rank, dtype):
    config = WaveConfig(moment_rank=rank, moment_dtype=dtype, **SIZES)
    state, (keys, values) = grown_state(config, [290, 3], 200)
    index = state.index
    assert (np.asarray(index.tokens) > np.asarray(index.prompt_tokens)).all()
    kept = jax.tree.map(lambda x: np.asarray(x, np.float64), index.moments)
    loss = 1e-3 if dtype == "model" else 0.02
    for b, h in itertools.product(range(2), range(2)):
        found = members(index, b, h)
        assert len(found) == int(index.num_clusters[0, b, h])
        for j, own in enumerate(found):
            d, e = (
                np.asarray(x[b, SIZES["sink_tokens"] + own, h], np.float64) for x in (keys, values)
            )
            d, e = d - d.mean(0), e - e.mean(0)
            cross, within = e.T @ d / len(own), d.T @ d / len(own)
            u, w, lambdas = (x[0, b, h, j] for x in kept[:3])
            if kept.weight_scales is not None:
                w = w * kept.weight_scales[0, b, h, j][:, None]
            best = np.sqrt((np.linalg.svd(cross, compute_uv=False)[rank:] ** 2).sum())
            scale = np.linalg.norm(cross)
            assert np.linalg.norm(cross - w.T @ u) <= 1.1 * best + loss * scale + 1e-6
            # What lambdas hold of the variance of keys along the directions.
            length = np.maximum((u * u).sum(-1), 1e-30)
            held = np.einsum("rd,de,re->r", u, within, u) / length
            np.testing.assert_allclose(lambdas * length, held, atol=loss * (held.max() + 1e-6))


def test_without_moments_there_are_none():
    state = WaveAttention(WaveConfig(**SIZES), "device").init_state(
        CacheShape.of(MODEL), 1, 300, 10, jnp.float32
    )
    assert state.index.moments is None


@pytest.mark.parametrize(("dtype", "size"), [("model", 4), ("bfloat16", 2), ("int8", 1)])
def test_moments_take_the_dtype_asked_for(dtype, size):
    config = WaveConfig(moment_rank=2, moment_dtype=dtype, **SIZES)
    state = WaveAttention(config, "device").init_state(
        CacheShape.of(MODEL), 1, 300, 10, jnp.float32
    )
    moments = state.index.moments
    assert moments.directions.dtype.itemsize == moments.weights.dtype.itemsize == size
    assert (moments.weight_scales is not None) == (dtype == "int8")
