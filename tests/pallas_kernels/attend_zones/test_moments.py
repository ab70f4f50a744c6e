"""The estimate by moments against float64, made of the clusters' members themselves."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.cluster_sums import sum_by_cluster
from pallas_kernels.types import NO_ID
from tests.support.moment_cases import BATCH, HEAD_DIM, SCALE, SIZES, Case, attend, members_of


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


def test_what_was_retrieved_does_not_spoil_the_order():
    """Halving all residuals divides the error by four where some of each cluster is retrieved."""
    errors = []
    for spread in (0.4, 0.2, 0.1, 0.05):
        case = Case(2, spread, picked=0.3)
        output, logsumexp = case.estimated()
        worst = []
        for at, query, rows in case.heads():
            _, total = case.true(at, query, rows)
            error = np.linalg.norm(output[at] * np.exp(logsumexp[at]) - total)
            worst.append(error / np.linalg.norm(total))
        errors.append(np.median(worst))
    for one, next_one in itertools.pairwise(errors):
        assert one / next_one > 3.5


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


def test_one_left_of_a_cluster_has_its_own_mean_and_no_moments():
    """But as one of three or more it is held to be no nearer than the whole cluster."""
    case = Case(4, picked=2.0)
    for b in range(BATCH):
        for rows in members_of(b):
            case.picked[b, :, rows[:1]] = False
    output, logsumexp = case.estimated()
    held = 0
    for at, query, rows in case.heads():
        mass, total = 0.0, 0.0
        for own in members_of(at[0]):
            if not len(own):
                continue
            logit, whole = rows[own[0], 0] @ query, rows[own, 0].mean(0) @ query
            if len(own) > 2:
                held += logit > whole
                logit = min(logit, whole)
            mass += np.exp(logit)
            total += np.exp(logit) * rows[own[0], 1]
        np.testing.assert_allclose(output[at], total / mass, atol=2e-4)
        assert logsumexp[at] == pytest.approx(np.log(mass), abs=2e-4)
    assert held


def test_few_that_remain_weigh_no_more_than_as_many_of_the_whole():
    """Whatever rounding adds to a stored mean: of one of many, n / n' times as much comes in."""
    case = Case(4, picked=2.0)
    for b in range(BATCH):
        for rows in members_of(b):
            case.picked[b, :, rows[: len(rows) > 2]] = False
    *operands, estimate = case.operands()
    logits = np.asarray(estimate.logits + 0.5, np.float64)
    _, logsumexp = case.estimated((*operands, estimate._replace(logits=jnp.asarray(logits))))
    for at, query, rows in case.heads():
        del query, rows
        left = np.flatnonzero(np.array(SIZES[at[0]]) > 2)
        assert logsumexp[at] <= np.log(np.exp(logits[at][left]).sum()) + 1e-4


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


def test_on_a_gpu_it_is_told_what_has_no_kernels(monkeypatch):
    case = Case(8, rank=2)
    operands = case.operands()
    keys = jnp.zeros((4, HEAD_DIM))
    clusters = jax.eval_shape(
        lambda: ops.build_clusters(
            keys, keys, 4, cluster_size=2, max_cluster_size=4, iterations=1, implementation="xla"
        )
    )
    device = types.SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    ops.forget()

    def trace():
        jax.eval_shape(lambda *x: ops.attend_zones(*x, 0, scale=SCALE), *operands)
        jax.eval_shape(lambda x: ops.build_spread(keys, keys, x), clusters)

    with pytest.warns(ops.FallbackWarning) as warned:
        trace()
    told = ops.explain()
    ops.forget()
    assert [(choice.op, choice.reason) for choice in told] == [
        ("attend_zones", "there is no kernel for bounds yet"),
        ("build_spread", "there is no kernel yet"),
    ]
    assert len(warned) == 2
