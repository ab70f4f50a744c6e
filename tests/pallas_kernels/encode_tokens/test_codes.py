"""One-bit codes: packing, the estimator's lack of bias, its error, and `score_tokens`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.encode_tokens.reference import pack_signs, unpack_signs
from pallas_kernels.score_tokens.reference import list_members
from pallas_kernels.select_clusters import list_candidates
from pallas_kernels.types import MASKED, NO_ID


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 256])
def test_signs_survive_packing(head_dim):
    x = jax.random.normal(jax.random.key(0), (3, 5, head_dim))
    words = pack_signs(x)
    assert words.dtype == jnp.uint32
    assert words.shape == (3, 5, -(-head_dim // 32))
    np.testing.assert_array_equal(unpack_signs(words, head_dim), np.where(x >= 0, 1, -1))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_rotation_is_orthogonal_and_fixed(head_dim):
    matrix = rotation(head_dim)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-5)
    assert rotation(head_dim) is matrix


def random_rotations(count, head_dim, seed):
    gaussian = jax.random.normal(jax.random.key(seed), (count, head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)  # numpy's: on a CPU jax's takes a minute
    return jnp.asarray(q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :])


def estimates(query, key, centroid, matrices):
    """The codes' estimate of q.k under each rotation."""

    def under(matrix):
        coded = ops.encode_tokens(key[None], centroid[None], matrix)
        signs = unpack_signs(coded.codes, key.shape[0])[0].astype(jnp.float32)
        return query @ centroid + coded.scales[0] * ((matrix @ query) @ signs)

    return np.asarray(jax.jit(jax.vmap(under))(matrices), np.float64)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_estimator_is_unbiased_with_the_error_that_theory_gives(head_dim):
    """RaBitQ, theorem 3.2, over random rotations: the mean is q.k, and the deviation is
    |q_perp| |r| tan(o-bar, o) / sqrt(D - 1), with q_perp the part of q across r and <o-bar, o>
    near sqrt(2 / pi)."""
    rng = np.random.default_rng(head_dim)
    query, key, centroid = jnp.asarray(rng.normal(size=(3, head_dim)), jnp.float32)
    matrices = random_rotations(600, head_dim, seed=head_dim)
    found = estimates(query, key, centroid, matrices)
    exact = float(query @ key)
    standard_error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - exact) < 4 * standard_error

    residual = np.asarray(key - centroid, np.float64)
    length = np.linalg.norm(residual)
    across = np.asarray(query) - residual * (np.asarray(query) @ residual) / length**2
    rotated = np.asarray(matrices) @ residual / length
    cosine = np.abs(rotated).sum(-1) / np.sqrt(head_dim)
    tangent = np.sqrt(1 - cosine**2) / cosine
    expected = np.linalg.norm(across) * length * np.sqrt(np.mean(tangent**2) / (head_dim - 1))
    assert cosine.mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)
    assert found.std() == pytest.approx(expected, rel=0.1)


def test_a_key_on_its_centroid_has_no_residual():
    key = jnp.ones((2, 64))
    coded = ops.encode_tokens(key, key, jnp.asarray(rotation(64)))
    np.testing.assert_array_equal(coded.scales, 0)


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("with_codes", [True, False])
def test_score_tokens_lists_the_members_and_estimates_their_mass(group, with_codes):
    rng = np.random.default_rng(group)
    layers, batch, heads, clusters, head_dim, room = 2, 2, 3, 11, 40, 48
    sizes = rng.integers(0, 8, (layers, batch, heads, clusters))
    sizes[..., 9:] = 0
    offsets = np.concatenate([np.zeros((layers, batch, heads, 1), int), sizes.cumsum(-1)], -1)
    tokens = offsets.max()
    x = rng.normal(size=(layers, batch, heads, tokens, head_dim))
    codes = pack_signs(jnp.asarray(x)) if with_codes else None
    scales = rng.uniform(size=(layers, batch, heads, tokens)).astype(np.float32)
    query = rng.normal(size=(batch, heads, group, head_dim)).astype(np.float32)
    logits = rng.normal(size=(batch, heads, group, clusters)).astype(np.float32)
    logsumexp = rng.normal(size=(batch, heads, group)).astype(np.float32)
    selected = rng.random((batch, heads, clusters)) < 0.6
    selected[1, 2] = False  # a row without candidates
    candidates = list_candidates(jnp.asarray(selected), jnp.asarray(sizes[1], jnp.int32), room)
    log_mass = ops.score_tokens(
        ops.ClusterScores(jnp.asarray(logits), jnp.asarray(logsumexp), jnp.asarray(query)),
        candidates,
        jnp.asarray(offsets, jnp.int32),
        ops.TokenCodes(codes, jnp.asarray(scales)) if with_codes else None,
        1,
        scale=0.3,
        max_candidates=room,
    )
    listed, of_clusters = list_members(candidates, jnp.asarray(offsets[1], jnp.int32), room)
    for b in range(batch):
        for h in range(heads):
            members = [
                (position, j)
                for j in range(clusters)
                if selected[b, h, j]
                for position in range(offsets[1, b, h, j], offsets[1, b, h, j + 1])
            ][:room]
            count = len(members)
            positions = [position for position, _ in members]
            assert listed[b, h].tolist() == positions + [NO_ID] * (room - count)
            assert of_clusters[b, h, :count].tolist() == [j for _, j in members]
            assert (np.asarray(log_mass[b, h, count:]) <= MASKED / 2).all()
            estimate = logits[b, h][:, [j for _, j in members]].astype(np.float64)
            if with_codes:
                signs = np.where(x[1, b, h, positions] >= 0, 1, -1)
                estimate += 0.3 * scales[1, b, h, positions] * (query[b, h] @ signs.T)
            mass = np.exp(estimate - logsumexp[b, h][:, None]).sum(0)
            np.testing.assert_allclose(log_mass[b, h, :count], np.log(mass), atol=2e-5)
