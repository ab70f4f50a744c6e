"""Bounds of the estimate against the truth in float64: never violated beyond rounding."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from tests.support.moment_cases import SCALE, SIZES, Case, attend

# Of numbers that float32 rounded.
ROUNDING = 1e-4


def check(case):
    """Holds the bounds to the truth; returns the output's error and its bound."""
    found = attend(*case.operands(), 0, scale=SCALE)
    output, _ = ops.merge_states(found.outputs, found.logsumexps)
    output = np.asarray(output, np.float64)
    bounds = [np.asarray(x, np.float64) for x in found.bounds]
    errors, certain = [], []
    for at, query, rows in case.heads():
        low, high, most = (x[at] for x in bounds)
        mass, _ = case.true(at, query, rows)
        if mass:
            assert low - ROUNDING <= np.log(mass) <= high + ROUNDING
        else:
            assert max(low, high) < -1e29
        rows = rows[: sum(SIZES[at[0]])]
        logits = rows[:, 0] @ query
        weights = np.exp(logits - logits.max())
        full = weights @ rows[:, 1] / weights.sum()
        error = np.linalg.norm(output[at] - full)
        assert error <= most + ROUNDING * (1 + np.abs(rows[:, 1]).max())
        errors.append(error)
        certain.append(most)
    return np.array(errors), np.array(certain)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.003, 3),
    size=st.floats(0.01, 3),
    picked=st.sampled_from([0.0, 0.2, 0.8, 2.0]),
    kind=st.sampled_from(["random", "aligned", "heavy"]),
)
@example(seed=0, spread=3.0, size=3.0, picked=0.2, kind="heavy")
@example(seed=1, spread=0.003, size=0.01, picked=0.0, kind="aligned")
def test_no_bound_is_violated(seed, spread, size, picked, kind):
    case = Case(seed, spread, rank=2, picked=picked, kind=kind)
    case.query = (size * case.query).astype(np.float32)
    check(case)


def test_bounds_say_something_where_residuals_are_small():
    """Their widths fall with the residuals: a bound that is infinite would hold too."""
    errors, certain = check(Case(2, spread=0.02, rank=2))
    assert (certain < 0.1).all()
    assert np.median(certain / np.maximum(errors, 1e-9)) < 200
    wide = check(Case(2, spread=0.2, rank=2))[1]
    assert (wide > 5 * certain).all()


def test_without_anything_estimated_nothing_is_uncertain():
    errors, certain = check(Case(3, rank=2, picked=2.0))
    assert (errors < 1e-5).all()
    assert not certain.any()


def test_without_a_spread_there_are_no_bounds():
    *operands, estimate = Case(4, rank=2).operands()
    found = attend(*operands, estimate, 0, scale=SCALE)
    correction = estimate.correction._replace(spread=None)
    plain = attend(*operands, estimate._replace(correction=correction), 0, scale=SCALE)
    assert plain.bounds is None
    for one, other in zip(found[:2], plain[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_spread_is_of_each_clusters_members():
    case = Case(5, rank=2)
    spread = case.operands()[-1].correction.spread
    rows = case.store[0, 0, 1, : SIZES[0][0]].astype(np.float64)
    distances = ((rows - rows.mean(0)) ** 2).sum(-1)
    expected = np.sqrt(distances[:, 0].max()), *distances.mean(0)
    for found, one in zip(spread, expected, strict=True):
        assert float(found[0, 0, 1, 0]) == pytest.approx(one, rel=1e-4)
        assert float(found[0, 0, 1, 0]) >= one * (1 - 1e-6)
        assert float(jnp.abs(found[0, 1, :, 3:]).max()) == 0
