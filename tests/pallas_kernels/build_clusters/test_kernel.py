"""The Triton kernels of `build_clusters` and `encode_tokens`, interpreted: against their semantics,
and lowered for the GPUs that they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.build_clusters import capacity
from pallas_kernels.build_clusters import reference as build_reference
from pallas_kernels.build_clusters import triton as build_triton
from pallas_kernels.encode_tokens import reference as encode_reference
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.encode_tokens import triton as encode_triton
from tests.support.lowering import lower_for

SETTINGS = {"cluster_size": 8, "max_cluster_size": 16, "iterations": 4}
build = jax.jit(functools.partial(build_triton.build_clusters, interpret=True, **SETTINGS))
build_plain = jax.jit(functools.partial(build_reference.build_clusters, **SETTINGS))


def blobs(rng, shape, dtype):
    """Keys far from the origin, around some points of very unequal weight."""
    *rows, tokens, head_dim = shape
    centres = rng.normal(size=(*rows, 9, head_dim)) * np.exp(rng.normal(size=(*rows, 9, 1)))
    kind = np.minimum(rng.geometric(0.3, (*rows, tokens)) - 1, 8)
    keys = np.take_along_axis(centres, kind[..., None], axis=-2)
    return jnp.asarray(keys + 0.3 * rng.normal(size=shape) + 2, dtype)


def check(clusters, keys, values, count):
    """Asserts all that `build_clusters` promises of one row."""
    tokens = keys.shape[0]
    offsets, order = np.asarray(clusters.offsets), np.asarray(clusters.order)
    sizes = np.diff(offsets)
    used = int((sizes > 0).sum())
    assert sizes.shape == (capacity(tokens, 8, 16),)
    assert (sizes[:used] > 0).all()
    assert sizes.max(initial=0) <= 16
    assert offsets[0] == 0
    assert offsets[-1] == count
    assert sorted(order[:count]) == list(range(count))
    assert list(order[count:]) == list(range(count, tokens))
    for j in range(used):
        members = order[offsets[j] : offsets[j + 1]]
        assert (np.diff(members) > 0).all()
        mean = np.asarray(keys, np.float64)[members].mean(0)
        np.testing.assert_allclose(clusters.centroids[j], mean, atol=2e-5)
        mean = np.asarray(values, np.float64)[members].mean(0)
        np.testing.assert_allclose(clusters.value_means[j], mean, atol=2e-5)
    np.testing.assert_array_equal(clusters.centroids[used:], 0)
    np.testing.assert_array_equal(clusters.value_means[used:], 0)


# Interpreting compiles for seconds: all tests share these shapes, and give each row its count.
SHAPES = {jnp.float32: (2, 200, 64), jnp.bfloat16: (2, 130, 96), jnp.float16: (2, 96, 128)}


def of_row(clusters, row):
    return jax.tree.map(lambda x: x[row], clusters)


@pytest.mark.parametrize("dtype", SHAPES)
def test_clusters_are_as_promised(dtype):
    rng = np.random.default_rng(SHAPES[dtype][-1])
    keys = blobs(rng, SHAPES[dtype], dtype)
    values = jnp.asarray(rng.normal(size=keys.shape), dtype)
    tokens = keys.shape[1]
    for counts in ((tokens, 77), (8, 8), (1, 0)):
        valid = (jnp.arange(tokens) < jnp.array(counts)[:, None])[..., None]
        padded = [jnp.where(valid, x, jnp.nan) for x in (keys, values)]
        clusters = build(*padded, jnp.array(counts))
        again = build(*padded, jnp.array(counts))
        jax.tree.map(np.testing.assert_array_equal, clusters, again)
        for row, count in enumerate(counts):
            check(of_row(clusters, row), keys[row], values[row], count)
            if dtype == jnp.float32:
                # Blobs this far apart leave rounding nothing to decide.
                plain = build_plain(padded[0][row], padded[1][row], jnp.int32(count))
                np.testing.assert_array_equal(clusters.order[row], plain.order)
                np.testing.assert_array_equal(clusters.offsets[row], plain.offsets)
                np.testing.assert_allclose(clusters.centroids[row], plain.centroids, atol=2e-5)
    assert clusters.centroids.dtype == clusters.value_means.dtype == jnp.float32
    assert clusters.offsets.dtype == clusters.order.dtype == jnp.int32


def test_a_row_does_not_depend_on_the_others():
    keys = blobs(np.random.default_rng(3), SHAPES[jnp.bfloat16], jnp.bfloat16)
    both = build(keys, keys, jnp.array([130, 23]))
    swapped = build(keys[::-1], keys[::-1], jnp.array([23, 130]))
    for row in range(2):
        jax.tree.map(np.testing.assert_array_equal, of_row(both, row), of_row(swapped, 1 - row))


def test_equal_keys_fill_even_pieces():
    # One cluster takes all: larger than a tile, and in as many pieces as it needs.
    keys = jnp.ones(SHAPES[jnp.float32], jnp.float32)
    clusters = of_row(build(keys, keys, jnp.array([200, 200])), 1)
    check(clusters, keys[1], keys[1], 200)
    sizes = np.diff(clusters.offsets)
    assert sorted(set(sizes[sizes > 0])) == [15, 16]


def objective(clusters, keys):
    """What k-means maximises: of the centred keys, the lengths of the clusters' sums."""
    x = np.asarray(keys, np.float64) - np.asarray(keys, np.float64).mean(0)
    parts = np.split(x[np.asarray(clusters.order)], np.asarray(clusters.offsets)[1:-1])
    return sum(np.linalg.norm(part.sum(0)) for part in parts)


def test_rounding_to_bfloat16_costs_no_quality():
    # Single results differ by some per cent either way, as those of k-means do: so, their mean.
    shape = SHAPES[jnp.bfloat16]
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        keys = blobs(rng, shape, jnp.float32) + (seed % 4) * rng.normal(size=shape)
        keys = keys.astype(jnp.bfloat16)
        own = build(keys, keys, jnp.array([130, 130]))
        for row in range(2):
            plain = build_plain(keys[row], keys[row], jnp.int32(130))
            ratios.append(objective(of_row(own, row), keys[row]) / objective(plain, keys[row]))
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("head_dim,dtype", [(64, "float32"), (96, "bfloat16")])
def test_codes_are_the_reference_s(head_dim, dtype):
    rng = np.random.default_rng(head_dim)
    keys, centroids = jnp.asarray(rng.normal(size=(2, 3, 70, head_dim)) + 5, dtype)
    centroids = centroids.at[0, 0].set(keys[0, 0])
    matrix = jnp.asarray(rotation(head_dim))
    own = jax.jit(functools.partial(encode_triton.encode_tokens, interpret=True))(
        keys, centroids, matrix
    )
    plain = encode_reference.encode_tokens(keys, centroids, matrix)
    assert own.codes.shape == plain.codes.shape
    assert own.codes.dtype == jnp.uint32
    np.testing.assert_allclose(own.scales, plain.scales, rtol=2e-5)
    signs = [encode_reference.unpack_signs(x.codes, head_dim) for x in (own, plain)]
    assert np.mean(signs[0] != signs[1]) < 2e-4


@pytest.mark.parametrize("encode", [encode_reference, encode_triton])
def test_a_code_of_what_is_not_finite_has_a_scale_of_nan(encode):
    keys = jnp.ones((1, 4, 64)).at[0, 1, 5].set(jnp.nan).at[0, 2, 5].set(jnp.inf)
    interpret = {} if encode is encode_reference else {"interpret": True}
    matrix = jnp.asarray(rotation(64))
    scales = encode.encode_tokens(keys, jnp.zeros_like(keys), matrix, **interpret).scales
    assert np.isfinite(scales[0]).tolist() == [True, False, False, True]


def test_what_is_not_supported_says_so():
    keys = jnp.ones((1, 32, 24))
    with pytest.raises(NotImplementedError, match="head_dim is 24"):
        ops.build_clusters(keys, keys, 32, **SETTINGS, implementation="triton")
    with pytest.raises(NotImplementedError, match="head_dim is 24"):
        ops.encode_tokens(keys, keys, jnp.ones((24, 24)), implementation="triton")
    keys = jax.ShapeDtypeStruct((1, 65536, 64), jnp.bfloat16)
    one = functools.partial(
        build_triton.build_clusters, cluster_size=1, max_cluster_size=1, iterations=1
    )
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(one, keys, keys, 65536)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize(
    "rows,head_dim,dtype",
    [(128, 128, "bfloat16"), (8, 96, "float16"), (8, 64, "float32"), (16, 256, "bfloat16")],
)
def test_kernels_lower_for(platform, rows, head_dim, dtype):
    keys = jax.ShapeDtypeStruct((rows, 8192, head_dim), dtype)
    function = functools.partial(
        build_triton.build_clusters, cluster_size=32, max_cluster_size=64, iterations=10
    )
    text = lower_for(platform, function, keys, keys, jax.ShapeDtypeStruct((), jnp.int32))
    for name in ("assign_tokens", "move_centroids", "cut_clusters", "average_pieces"):
        assert name in text
    matrix = jax.ShapeDtypeStruct((head_dim, head_dim), jnp.float32)
    assert "encode_tokens" in lower_for(platform, encode_triton.encode_tokens, keys, keys, matrix)
