"""The estimate by moments against float64, made of the clusters' members themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_zones._rest import sum_by_cluster
from pallas_kernels.build_moments import in_int8
from pallas_kernels.types import (
    NO_ID,
    Clusters,
    Correction,
    Estimate,
    Picks,
    SteadyRows,
    StoredRows,
)

BATCH, HEADS, GROUP, HEAD_DIM, SCALE = 2, 2, 3, 8, 0.35
# Members of the clusters of each sequence, in rising order of their store rows; room for one more.
SIZES = ((12, 1, 20, 7, 24), (30, 2, 9, 0, 0))
CLUSTERS, TOKENS = 6, sum(SIZES[0])


build = jax.jit(ops.build_moments, static_argnames="rank")
attend = jax.jit(ops.attend_zones, static_argnames="scale")


def members_of(b):
    ends = np.cumsum(SIZES[b])
    return [np.arange(end - size, end) for size, end in zip(SIZES[b], ends, strict=True)]


class Case:
    """Clusters of a layer, moments of rank head_dim, and rows to retrieve of them."""

    def __init__(self, seed, spread=0.5, rank=HEAD_DIM, picked=0.3, eight_bits=False):
        rng = np.random.default_rng(seed)
        shape = (1, BATCH, HEADS, TOKENS, 2, HEAD_DIM)
        centres = rng.normal(size=(1, BATCH, HEADS, CLUSTERS, 2, HEAD_DIM))
        own = np.zeros((BATCH, TOKENS), int)
        for b in range(BATCH):
            for j, rows in enumerate(members_of(b)):
                own[b, rows] = j
        self.own = own
        residuals = rng.normal(size=shape)
        residuals[..., 1, :] += residuals[..., 0, :] @ rng.normal(size=(HEAD_DIM, HEAD_DIM))
        self.store = np.stack([centres[:, b][:, :, own[b]] for b in range(BATCH)], axis=1)
        self.store = (self.store + spread * residuals).astype(np.float32)
        for b in range(BATCH):
            self.store[:, b, :, sum(SIZES[b]) :] = np.nan
        self.query = 2 * rng.normal(size=(BATCH, HEADS, GROUP, HEAD_DIM)).astype(np.float32)
        self.picked = rng.random((BATCH, HEADS, TOKENS)) < picked
        for b in range(BATCH):
            self.picked[b, :, sum(SIZES[b]) :] = False
        self.rank, self.eight_bits = rank, eight_bits

    def operands(self):
        sizes = np.zeros((BATCH, CLUSTERS), int)
        for b in range(BATCH):
            sizes[b, : len(SIZES[b])] = SIZES[b]
        offsets = np.concatenate([np.zeros((BATCH, 1), int), sizes.cumsum(-1)], -1)
        offsets = jnp.asarray(np.repeat(offsets[None, :, None], HEADS, 2), jnp.int32)
        keys, values = (jnp.asarray(self.store[0, ..., i, :]) for i in (0, 1))

        def means(x):
            found = np.full((BATCH, HEADS, CLUSTERS, HEAD_DIM), np.nan, np.float32)
            for b in range(BATCH):
                for j, rows in enumerate(members_of(b)):
                    if len(rows):
                        found[b, :, j] = np.asarray(x, np.float64)[b, :, rows].mean(0)
            return jnp.asarray(found)

        centroids, value_means = means(keys), means(values)
        order = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, HEADS, TOKENS))
        clusters = Clusters(centroids, value_means, offsets[0], order)
        moments = build(keys, values, clusters, rank=self.rank)
        moments = jax.tree.map(lambda x: x[None], in_int8(moments) if self.eight_bits else moments)
        room = TOKENS + 2  # one for all cases, so that little is compiled
        tokens = np.full((BATCH, HEADS, room), NO_ID, np.int32)
        own = np.full((BATCH, HEADS, room), NO_ID, np.int32)
        remaining = np.repeat(sizes[:, None], HEADS, 1)
        for b in range(BATCH):
            for h in range(HEADS):
                rows = np.flatnonzero(self.picked[b, h])
                # One that is not worth reading lies between the others.
                at = [*range(min(2, len(rows))), *range(3, len(rows) + 1)]
                tokens[b, h, at], own[b, h, at] = rows, self.own[b, rows]
                np.subtract.at(remaining[b, h], self.own[b, rows], 1)
        query = jnp.asarray(self.query)
        scores = ops.score_clusters(
            query, centroids[None], offsets, 0, scale=SCALE, directions=moments.directions
        )
        correction = Correction(moments, scores.products, jnp.asarray(own))
        nothing = jnp.full((1, BATCH, HEADS, 1, 2, HEAD_DIM), jnp.nan), jnp.zeros(BATCH, jnp.int32)
        steady = SteadyRows(*nothing, *nothing)
        return (
            query,
            steady,
            StoredRows(jnp.asarray(self.store), jnp.zeros((1, BATCH, HEADS, 0, 2, HEAD_DIM))),
            Picks(
                jnp.asarray(tokens), jnp.full(tokens.shape, NO_ID), jnp.zeros(tokens.shape, bool)
            ),
            Estimate(
                scores.logits,
                value_means[None],
                offsets,
                jnp.asarray(remaining, jnp.int32),
                correction,
            ),
        )

    def estimated(self, operands=None):
        """Output and mass of what remains."""
        operands = self.operands() if operands is None else operands
        found = attend(*operands, 0, scale=SCALE)
        return np.asarray(found.outputs[2], np.float64), np.asarray(found.logsumexps[2], np.float64)

    def heads(self):
        for b, h, g in np.ndindex(BATCH, HEADS, GROUP):
            rows = self.store[0, b, h].astype(np.float64)
            yield (b, h, g), SCALE * self.query[b, h, g].astype(np.float64), rows

    def second_order(self, at, query, rows):
        """Mass and weighted values of what remains by the formulas, nothing truncated."""
        mass, total = 0.0, np.zeros(HEAD_DIM)
        b, h, _ = at
        for own in members_of(b):
            left = own[~self.picked[b, h, own]]
            if not len(left):
                continue
            key, value = (rows[left, i].mean(0) for i in (0, 1))
            d, e = (rows[own, i] - rows[own, i].mean(0) for i in (0, 1))
            x, n = d @ query, len(own)
            share = 0 if n == 1 else (1 - 1 / len(left)) / (1 - 1 / n)
            more = min(share * (x**2).mean() / 2, 2)
            weight = len(left) * np.exp(key @ query)
            mass += weight * (1 + more)
            total += weight * ((1 + more) * value + share * (e * x[:, None]).mean(0))
        return mass, total

    def true(self, at, query, rows):
        """Mass and weighted values of what remains."""
        left = ~self.picked[at[:2]] & (np.arange(TOKENS) < sum(SIZES[at[0]]))
        weights = np.exp(rows[left, 0] @ query)
        return weights.sum(), weights @ rows[left, 1]


@pytest.mark.parametrize("picked", [0.0, 0.3])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_it_is_the_second_order_of_what_remains(picked, eight_bits):
    case = Case(1, picked=picked, eight_bits=eight_bits)
    output, logsumexp = case.estimated()
    tolerance = 0.03 if eight_bits else 2e-4
    for at, query, rows in case.heads():
        mass, total = case.second_order(at, query, rows)
        np.testing.assert_allclose(output[at], total / mass, atol=tolerance)
        assert logsumexp[at] == pytest.approx(np.log(mass), abs=tolerance)


def test_the_error_is_of_third_order_in_the_residuals():
    """Halving all residuals divides the error by eight; without moments by four."""
    errors, without = [], []
    for spread in (0.4, 0.2, 0.1):
        case = Case(2, spread, picked=0)
        operands = case.operands()
        plain = *operands[:-1], operands[-1]._replace(correction=None)
        for given, found in ((operands, errors), (plain, without)):
            output, logsumexp = case.estimated(given)
            worst = []
            for at, query, rows in case.heads():
                _, total = case.true(at, query, rows)
                error = np.linalg.norm(output[at] * np.exp(logsumexp[at]) - total)
                worst.append(error / np.linalg.norm(total))
            found.append(np.median(worst))
    assert errors[0] < without[0] / 2
    for one, next_one in itertools.pairwise(errors):
        assert one / next_one > 6.5
    for one, next_one in itertools.pairwise(without):
        assert 3 < one / next_one < 5.5


def test_when_nothing_is_left_it_is_full_attention():
    case = Case(3, picked=2.0)
    found = attend(*case.operands(), 0, scale=SCALE)
    output, logsumexp = ops.merge_states(found.outputs, found.logsumexps)
    assert (np.asarray(found.logsumexps[2]) < -1e29).all()
    for at, query, rows in case.heads():
        rows = rows[: sum(SIZES[at[0]])]
        weights = np.exp(rows[:, 0] @ query)
        np.testing.assert_allclose(output[at], weights @ rows[:, 1] / weights.sum(), atol=2e-6)
        assert float(logsumexp[at]) == pytest.approx(np.log(weights.sum()), abs=1e-5)


def test_one_left_of_a_cluster_is_exact():
    """Its mean key and its mean value are its own, and moments of one are nothing."""
    case = Case(4, picked=2.0)
    for b in range(BATCH):
        for rows in members_of(b):
            case.picked[b, :, rows[:1]] = False
    output, logsumexp = case.estimated()
    for at, query, rows in case.heads():
        mass, total = case.true(at, query, rows)
        np.testing.assert_allclose(output[at], total / mass, atol=2e-4)
        assert logsumexp[at] == pytest.approx(np.log(mass), abs=2e-4)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
def test_masses_are_positive_whatever_the_query(size):
    case = Case(5, rank=2)
    case.query = (size * case.query).astype(np.float32)
    output, logsumexp = case.estimated()
    assert np.isfinite(output).all()
    assert np.isfinite(logsumexp).all()
    assert (logsumexp > -1e29).all()


def test_a_number_that_is_not_finite_stays_in_its_head():
    case = Case(7, rank=2)
    sound, _ = case.estimated()
    left = np.flatnonzero(~case.picked[0, 1, : SIZES[0][0]])
    case.store[0, 0, 1, left[0], 0, 2] = np.nan
    spoilt, _ = case.estimated()
    assert np.isnan(spoilt[0, 1]).all()
    for at in ((0, 0), (1, 0), (1, 1)):
        np.testing.assert_array_equal(spoilt[at], sound[at])


def test_clusters_left_out_count_nothing():
    case = Case(6, rank=2)
    operands = case.operands()
    estimate = operands[-1]
    left_out = estimate._replace(remaining=jnp.zeros_like(estimate.remaining))
    _, logsumexp = case.estimated((*operands[:-1], left_out))
    assert (logsumexp < -1e29).all()


def test_sums_by_cluster():
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 9, (2, 3, 40)), axis=-1)
    x = rng.normal(size=(2, 3, 40, 2)).astype(np.float32)
    none = rng.random((2, 3, 40)) < 0.3
    x[none] = 0
    found = sum_by_cluster(
        jnp.asarray(x), jnp.asarray(np.where(none, NO_ID, clusters), jnp.int32), 10
    )
    for b, h in np.ndindex(2, 3):
        for j in range(10):
            own = x[b, h].astype(np.float64)[(clusters[b, h] == j) & ~none[b, h]]
            np.testing.assert_allclose(found[b, h, j], own.sum(0), atol=1e-5)
