"""The TPU's kernel of `score_clusters`, interpreted as on a TPU, and lowered for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_clusters import reference, tpu
from pallas_kernels.types import MASKED
from tests.support.lowering import lower_for
from tests.support.tpu_interpreter import interpret

LAYERS, BATCH, HEADS, LAYER, SCALE = 2, 3, 2, 1, 0.2
IN_USE = (300, 130, 0)  # clusters of each sequence


def cluster_case(seed, group, head_dim, dtype, room=IN_USE[0]):
    """Clusters of some sequences; all that must not be read is NaN."""
    rng = np.random.default_rng(seed)
    row = (LAYERS, BATCH, HEADS)
    sizes = rng.integers(0, 9, (*row, room))
    for b, count in enumerate(IN_USE):
        sizes[:, b, :, count:] = 0
    centroids = rng.normal(size=(*row, room, head_dim))
    centroids[sizes == 0] = np.nan
    centroids[[layer for layer in range(LAYERS) if layer != LAYER]] = np.nan
    offsets = np.concatenate([np.zeros((*row, 1), int), sizes.cumsum(-1)], -1)
    query = 2 * rng.normal(size=(BATCH, HEADS, group, head_dim))
    operands = jnp.asarray(query, dtype), jnp.asarray(centroids, dtype)
    return *operands, jnp.asarray(offsets, jnp.int32), jnp.int32(LAYER)


def in_float64(query, centroids, offsets, layer):
    """Logits `[batch, kv_heads, group, clusters]`, NaN for none, and their logsumexp."""
    sizes = np.diff(np.asarray(offsets)[layer])[:, :, None]
    query, centroids = (np.asarray(x, np.float64) for x in (query, centroids[layer]))
    logits = SCALE * np.sum(query[:, :, :, None] * centroids[:, :, None], axis=-1)
    masses = np.where(sizes > 0, sizes * np.exp(logits), 0).sum(axis=-1)
    return logits, np.log(np.maximum(masses, 1e-300)), masses > 0


@pytest.mark.parametrize(
    "group, head_dim, dtype, block",
    [(3, 64, "float32", 128), (5, 128, "bfloat16", 128), (1, 256, "float32", None)],
)
def test_it_is_the_reference(group, head_dim, dtype, block):
    case = cluster_case(group, group, head_dim, dtype)
    settings = {"scale": SCALE, "rotated": True}
    config = block and tpu.Config(block)
    kernel = functools.partial(tpu.score_clusters, config=config, interpret=True, **settings)
    found = interpret(kernel, *case)
    expected = reference.score_clusters(*case, **settings)
    np.testing.assert_allclose(found.logits, expected.logits, atol=3e-5)
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6, atol=3e-5)
    np.testing.assert_allclose(found.rotated, expected.rotated, atol=1e-5)
    logits, logsumexp, some = in_float64(*case)
    exists = ~np.isnan(logits)
    np.testing.assert_array_equal(np.asarray(found.logits)[~exists], np.float32(MASKED))
    np.testing.assert_allclose(np.asarray(found.logits)[exists], logits[exists], atol=3e-5)
    np.testing.assert_allclose(np.asarray(found.logsumexp)[some], logsumexp[some], atol=3e-5)
    assert not some[2].any()
    assert some[:2].all()
    np.testing.assert_array_equal(np.asarray(found.logsumexp)[2], np.float32(MASKED))


def test_nan_in_a_cluster_shows_in_its_row_alone():
    query, centroids, offsets, layer = cluster_case(0, 2, 64, "float32")
    [at, *_] = np.flatnonzero(np.diff(offsets[LAYER, 0, 1]))
    centroids = centroids.at[LAYER, 0, 1, at, 7].set(jnp.nan)
    kernel = functools.partial(tpu.score_clusters, scale=SCALE, interpret=True)
    found = interpret(kernel, query, centroids, offsets, layer)
    spoilt = np.isnan(np.asarray(found.logsumexp))
    assert spoilt[0, 1].all()
    assert spoilt.sum() == 2
    assert np.isnan(np.asarray(found.logits)).sum() == 2


@pytest.mark.parametrize(
    "change, match",
    [
        ({"head_dim": 32}, "head_dim is 32"),
        ({"dtype": "float16"}, "float16; the TPU's kernel knows"),
        ({"room": 0}, "centroids are empty"),
        ({"directions": jnp.zeros(1)}, "no kernel for moments"),
    ],
)
def test_it_says_what_it_does_not_support(change, match):
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", "float32")
    row = (LAYERS, BATCH, HEADS, change.get("room", 8))
    operands = (
        jnp.zeros((BATCH, HEADS, 4, head_dim), dtype),
        jnp.zeros((*row, head_dim), dtype),
        jnp.zeros((*row[:3], row[3] + 1), jnp.int32),
    )
    with pytest.raises(NotImplementedError, match=match):
        tpu.score_clusters(*operands, 0, scale=1.0, directions=change.get("directions"))


@pytest.mark.parametrize("group, head_dim, dtype", [(3, 64, "bfloat16"), (16, 256, "float32")])
def test_it_lowers(group, head_dim, dtype):
    case = jax.eval_shape(lambda: cluster_case(0, group, head_dim, dtype))
    text = lower_for("tpu", functools.partial(tpu.score_clusters, scale=SCALE), *case)
    assert 'kernel_name = "score_clusters"' in text
