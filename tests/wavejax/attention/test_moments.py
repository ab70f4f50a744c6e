"""Wave attention with moments: full attention where all is retrieved, else nearer to it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import NO_ID
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig
from wavejax.store.shape import CacheShape

MODEL = model_of(kv_heads=2, group=2, head_dim=16)
SIZES = {
    "sink_tokens": 2, "local_tokens": 8, "growth_tokens": 64, "segment_tokens": 256,
    "cluster_size": 16, "max_cluster_size": 32, "min_clusters": 0, "min_candidate_tokens": 64,
}  # fmt: skip
LENGTHS, STEPS = [500, 5], 100


def stream_of():
    """Values that follow keys, but for a part of their own."""
    rng = np.random.default_rng(0)
    query, key, value = random_stream(MODEL, rng, max(LENGTHS) + STEPS, len(LENGTHS))
    return query, key, 0.5 * value + key @ (rng.normal(size=(16, 16)) / 4).astype(np.float32)


def outputs_of(attention):
    stream = stream_of()
    state = attention.init_state(CacheShape.of(MODEL), 2, max(LENGTHS), STEPS, jnp.float32)
    _, state = prefill(attention, state, stream, LENGTHS)
    start = jnp.asarray(LENGTHS, jnp.int32)
    outputs, state = decode(attention, state, stream, start, STEPS)
    return np.asarray(outputs), state


@pytest.fixture(scope="module")
def full():
    return outputs_of(DenseAttention())[0]


def test_when_all_is_retrieved_it_is_full_attention(full):
    config = WaveConfig(moment_rank=2, min_retrieved_tokens=2000, cache_fraction=0.01, **SIZES)
    outputs, state = outputs_of(WaveAttention(config, "host"))
    np.testing.assert_allclose(outputs, full, atol=1e-5)
    assert (np.asarray(state.index.tokens) > np.asarray(state.index.prompt_tokens)).all()


def test_moments_bring_it_nearer(full):
    errors = []
    for rank, dtype in ((0, "model"), (4, "int8")):
        config = WaveConfig(moment_rank=rank, moment_dtype=dtype, min_retrieved_tokens=16, **SIZES)
        outputs, _ = outputs_of(WaveAttention(config, "device"))
        norms = (np.linalg.norm(x, axis=-1) for x in (outputs - full, full))
        errors.append(np.mean(next(norms) / next(norms)))
    assert errors[1] < 0.6 * errors[0]


def test_each_retrieved_token_is_told_with_its_cluster():
    config = WaveConfig(moment_rank=1, min_retrieved_tokens=24, **SIZES)
    attention = WaveAttention(config, "device")
    _, state = outputs_of(attention)
    query, key, value = (x[:, :1] for x in stream_of())
    layer = jnp.int32(0)
    selection, _ = jax.jit(attention.select)(layer, query, key, value, state)
    index = state.index
    for b, h in itertools.product(range(2), range(2)):
        tokens, clusters = (np.asarray(x[b, h]) for x in (selection.tokens, selection.clusters))
        offsets, ids = np.asarray(index.offsets[0, b, h]), np.asarray(index.token_ids[0, b, h])
        prompt, place = int(index.prompt_tokens[b]), np.arange(len(ids))
        start = np.where(place < prompt, place // 256 * 256, prompt + (place - prompt) // 64 * 64)
        cluster_of = dict(
            zip(
                (start + ids)[: offsets[-1]],
                np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
                strict=True,
            )
        )
        listed = tokens != NO_ID
        assert listed.sum() == 24
        assert clusters[listed].tolist() == [cluster_of[token] for token in tokens[listed]]
        assert (clusters[~listed] == NO_ID).all()
        assert (np.diff(clusters[listed]) >= 0).all()


def test_staged_rows_are_refused():
    with pytest.raises(
        InputError, match="`moment_rank` is not 0 and rows in host memory are staged"
    ):
        WaveAttention(WaveConfig(moment_rank=1), "host", "staged")
