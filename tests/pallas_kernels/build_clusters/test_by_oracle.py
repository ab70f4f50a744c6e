"""`build_clusters`, plain and as kernels, against k-means in float64 that shares no code with it.

Every case is far from where rounding decides (`decided`), so the same tokens must be together.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.build_clusters import reference, triton
from tests.support.cluster_oracle import agrees, clusters_of, unit

TOKENS, DIM = 200, 64  # of all cases, so that each implementation is compiled once
SIZE = 40
# The iterations to the main direction begin with this one: a cluster that is cut along it, or along
# what few iterations make of it, is cut wrongly in the cases below.
START = unit(np.cos(np.arange(DIM) ** 2.0))


def axis(i, length=8.0):
    return length * np.eye(DIM)[i]


def stretched(rng, cosine, across, count=40):
    """Deviations along a direction of this cosine to START; across it, toward START, `across`."""
    direction = rng.normal(size=DIM)
    direction = unit(direction - (direction @ START) * START)
    direction = cosine * START + np.sqrt(1 - cosine**2) * direction
    toward = unit(START - (START @ direction) * direction)
    along = rng.permutation(np.linspace(-1, 1, count))
    side = across * rng.uniform(-1, 1, count)
    noise = 1e-3 * rng.normal(size=(count, DIM))
    return along[:, None] * direction + side[:, None] * toward + noise


def several_directions(rng, cosine, across):
    """Three clusters, each too large, each with a main direction of its own."""
    return np.concatenate([axis(20 + b) + stretched(rng, cosine, across) for b in range(3)])


def bad_starts(rng):
    """All five centroids begin in one of five groups, of which others are large and small."""
    group = rng.choice(5, TOKENS, p=[0.2, 0.35, 0.3, 0.1, 0.05])
    group[20::40] = 0
    return 4 * rng.normal(size=(5, DIM))[group] + rng.normal(size=(TOKENS, DIM))


def unequal_starts(rng):
    """Groups in a row, cut by the starts elsewhere than where they end; a mean far away."""
    group = np.repeat(np.arange(4), [15, 90, 70, 25])
    return 50 + rng.normal(size=(4, DIM))[group] + 0.2 * rng.normal(size=(TOKENS, DIM))


def equal_starts(rng):
    """Both centroids begin as the same key and all goes to the first: ties to the lower id. Many
    of its members have the same place along the main direction: these go by their number."""
    place = rng.permutation(np.repeat([-7, -5, -3, -1, 1, 3, 5, 7], 8))
    # The middles of the two equal parts. Swapped, and 64 in all, so that the mean, and with it the
    # cluster's sum, is exactly zero: else rounding would give it a direction.
    for middle in (16, 48):
        other = np.flatnonzero(place == 7)[-1]
        place[[middle, other]] = place[[other, middle]]
    assert (place[[16, 48]] == 7).all()
    return np.where(np.arange(DIM) < 2, 50.0, 0) + place[:, None] * np.eye(DIM)[5]


def orthogonal_start(rng):
    """A main direction that START has no part in but by rounding."""
    direction = np.zeros(DIM)
    direction[3], direction[4] = np.float32(START[4]), -np.float32(START[3])
    return rng.permutation(np.linspace(-1, 1, 40))[:, None] * direction


def all_equal(rng):
    return np.full((100, DIM), 3.0)


CASES = {
    "several directions": lambda rng: several_directions(rng, 0.3, 0.4),
    "directions far from the start": lambda rng: several_directions(rng, 0.01, 0.4),
    "directions across the start": lambda rng: several_directions(rng, 0.0, 0.1),
    "bad starts": bad_starts,
    "unequal starts": unequal_starts,
    "equal starts": equal_starts,
    "orthogonal start": orthogonal_start,
    "all equal": all_equal,
    "one token": lambda rng: rng.normal(size=(1, DIM)),
    "just not too many": lambda rng: rng.normal(size=(16, DIM)),
    "one too many": lambda rng: stretched(rng, 0.1, 0.3, count=17),
}


@functools.cache
def keys_of(name):
    """The case's keys as float32, and the values of its tokens."""
    rng = np.random.default_rng(sorted(CASES).index(name))
    keys = CASES[name](rng).astype(np.float32)
    return keys, rng.normal(size=keys.shape).astype(np.float32)


def padded(x):
    return np.pad(x, ((0, TOKENS - len(x)), (0, 0)), constant_values=np.nan)


# Where groups have no main direction they are not cut.
UNCUT = ["bad starts", "unequal starts"]
RUNS = [
    (name, most, iterations)
    for name in CASES
    for most in (16, TOKENS)
    for iterations in (0, 5)
    if most == TOKENS or name not in UNCUT
]
runs = pytest.mark.parametrize("name, most, iterations", RUNS)


def expect(name, most, iterations):
    return clusters_of(keys_of(name)[0], SIZE, most, iterations)


@functools.cache
def found(implementation, most, iterations):
    """Clusters of all cases, each a row, by one call."""
    if implementation == "plain":
        build = reference.build_clusters
    else:
        build = functools.partial(triton.build_clusters, interpret=True)
    settings = {"cluster_size": SIZE, "max_cluster_size": most, "iterations": iterations}
    build = jax.jit(functools.partial(build, **settings))
    keys, values = (np.stack([padded(keys_of(name)[i]) for name in CASES]) for i in range(2))
    counts = jnp.array([len(keys_of(name)[0]) for name in CASES], jnp.int32)
    return jax.tree.map(np.asarray, build(jnp.asarray(keys), jnp.asarray(values), counts))


@runs
def test_the_cases_are_decided(name, most, iterations):
    """By more than float32 may err, and what they are named for is in them."""
    expected = expect(name, most, iterations)
    assert expected.margin > 5e-4 or name == "all equal"
    assert expected.edge > 3e-3
    lengths = [len(piece) for choices in expected.pieces for piece in choices[0]]
    assert max(lengths) <= most
    assert sum(lengths) == len(keys_of(name)[0])
    assert (expected.cut > 0) == (most < len(keys_of(name)[0]))
    if name == "equal starts":
        assert len(expected.pieces) == 1
    if name in UNCUT:  # the iterations matter
        assert iterations == 0 or expect(name, most, 1).pieces != expected.pieces


@runs
@pytest.mark.parametrize("implementation", ["plain", "kernels"])
def test_clusters_are_those_of_float64(name, most, iterations, implementation):
    keys, values = (x.astype(np.float64) for x in keys_of(name))
    clusters = found(implementation, most, iterations)
    row = list(CASES).index(name)
    offsets, order = clusters.offsets[row], clusters.order[row]
    pieces = [order[low:high].tolist() for low, high in itertools.pairwise(offsets) if low < high]
    assert agrees(expect(name, most, iterations), pieces)
    for j, piece in enumerate(pieces):
        np.testing.assert_allclose(clusters.centroids[row, j], keys[piece].mean(0), 1e-6, 1e-5)
        np.testing.assert_allclose(clusters.value_means[row, j], values[piece].mean(0), 1e-6, 1e-5)


def test_ties_between_different_centroids_go_to_the_lower_id():
    """Before they move: tokens between two axes, as near to one as to the other, exactly."""
    keys = np.zeros((40, DIM))
    keys[:, :2] = [(a, b) for a in (1, -1) for b in (1, -1)] * 10
    # The middles of the two equal parts, and what keeps the mean at zero; a corner and its opposite
    # make room for each.
    keys[[11, 31], :2] = 0
    keys[[8, 28], :2] = 0
    keys[[10, 30], :2] = (4, 0), (0, 4)
    keys[[9, 29], :2] = (-4, 0), (0, -4)
    assert (keys.sum(axis=0) == 0).all()
    tied = keys[:, 0] == keys[:, 1]
    assert tied.sum() > 5
    first = np.flatnonzero(tied | (keys[:, 0] > keys[:, 1])).tolist()
    rest = np.flatnonzero(~tied & (keys[:, 0] < keys[:, 1])).tolist()
    settings = {"cluster_size": 20, "max_cluster_size": 40, "iterations": 0}
    x = jnp.asarray(keys, jnp.float32)[None]
    for build in (
        reference.build_clusters,
        functools.partial(triton.build_clusters, interpret=True),
    ):
        clusters = jax.jit(functools.partial(build, **settings))(x, x, jnp.int32(40))
        offsets, order = np.asarray(clusters.offsets[0]), np.asarray(clusters.order[0])
        assert order[: offsets[1]].tolist() == first
        assert order[offsets[1] : offsets[2]].tolist() == rest
