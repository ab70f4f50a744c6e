"""What a tolerance retrieves, made of a probe's figures, is what it retrieves in truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import model_of, prefill, random_stream
from tests.support.tiny_generator import CONFIG
from wavejax import DenseAttention, WaveAttention
from wavejax.evaluation.tolerance_probe import (
    BudgetedAttention,
    BudgetedState,
    BudgetsProbe,
    Measured,
    ladder,
    start_probe,
)
from wavejax.evaluation.tolerance_report import Mode, adaptive, by_truth, fixed, row_of
from wavejax.store.shape import CacheShape
from wavejax.store.state import WaveState
from wavejax.store.tolerance import shares_of

LENGTHS = [290, 170]
DRAWS = 24
TOLERANT = dataclasses.replace(
    CONFIG,
    retrieval_fraction=0.0,
    min_retrieved_tokens=20,
    min_candidate_tokens=320,
    tolerance=0.1,
    tolerance_draws=DRAWS,
    tolerance_cap=4,
)


def started(attention, model, stream):
    room = (CacheShape.of(model), len(LENGTHS), max(LENGTHS), 8, jnp.float32)
    state = attention.init_state(*room)
    return prefill(attention, state, stream, LENGTHS, room=max(LENGTHS))[1]


@pytest.fixture(scope="module")
def case():
    """A stream, the step after the prompts, full attention's output and wave attention's state."""
    model = model_of()
    query, key, value = random_stream(model, np.random.default_rng(3), max(LENGTHS) + 1, 2)
    # Values with a mean: an output near zero has no bound of its relative error.
    stream = query, key, value + 1.0
    dense = started(DenseAttention(), model, stream)
    wave = started(WaveAttention(TOLERANT, "device"), model, stream)
    step = [x[jnp.arange(2), jnp.asarray(LENGTHS)][:, None] for x in stream]
    exact, _ = DenseAttention().decode(jnp.int32(0), *step, dense)
    return model, dense, wave, step, np.asarray(exact[:, 0], np.float64)


def probed(case, limits, budgets):
    model, dense, wave, step, _ = case
    most = ladder(TOLERANT, wave.index.token_ids.shape[-1])[-1]
    state = start_probe(dense, wave, limits, budgets, heads=model.num_heads)
    probe = BudgetsProbe(method=WaveAttention(TOLERANT, "device"), most=most)
    _, state = jax.jit(BudgetsProbe.decode, static_argnums=0)(probe, jnp.int32(0), *step, state)
    return Measured(*(np.asarray(x)[None] for x in state.measured))


def errors(found, exact):
    found = np.asarray(found[:, 0], np.float64)
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.fixture(scope="module")
def limits(case):
    """Tolerances that no head, some heads and all heads are within at first."""
    bounds = probed(case, [0.1], []).bound[:, 0].max(axis=-1)
    finite = np.sort(bounds[np.isfinite(bounds)])
    return [0.02, *(float(1.01 * x) for x in (finite[0] / 1.5, finite[0], finite[-1]))]


@pytest.mark.slow(40)
def test_errors_and_heads_are_those_of_the_real_step(case, limits):
    *_, wave, step, exact = case
    attention = WaveAttention(TOLERANT, "device")
    decode = jax.jit(WaveAttention.decode, static_argnums=0)
    measured, rows = probed(case, limits, []), set()
    for i, limit in enumerate(limits):
        log = dataclasses.replace(wave.tolerance, limits=jnp.full(2, limit, jnp.float32))
        state = dataclasses.replace(wave, tolerance=log)
        output, state = decode(attention, jnp.int32(0), *step, state)
        mode = adaptive(measured, 1 + i, limit, DRAWS)
        np.testing.assert_allclose(mode.error, errors(output, exact).ravel(), rtol=1e-3, atol=1e-6)
        assert mode.capped == pytest.approx(shares_of(state.tolerance)[3])
        rows |= set(mode.rows.tolist())
    # Heads stopped at the first budget, at the cap and between them.
    assert min(rows) == 20
    assert max(rows) == 80
    assert len(rows) > 2


@pytest.mark.slow(20)
def test_a_budget_that_is_data_is_that_of_the_settings(case):
    _, _, wave, step, exact = case
    plain = dataclasses.replace(TOLERANT, tolerance=0.0)
    fields = {field.name: getattr(wave, field.name) for field in dataclasses.fields(WaveState)}
    fields["tolerance"] = None
    probe = probed(case, [0.1], [31, 40])
    for place, budget in ((0, 20), (2, 31), (3, 40)):
        settled = WaveAttention(dataclasses.replace(plain, min_retrieved_tokens=budget), "device")
        expected, _ = settled.decode(jnp.int32(0), *step, WaveState(**fields))
        wide = BudgetedAttention(dataclasses.replace(plain, min_retrieved_tokens=80), "device")
        state = BudgetedState(**fields, budget=jnp.int32(budget))
        found, state = wide.decode(jnp.int32(0), *step, state)
        assert isinstance(state, BudgetedState)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        own = fixed(probe, place)
        np.testing.assert_allclose(own.error, errors(expected, exact).ravel(), rtol=1e-3, atol=1e-6)
        assert (own.rows == budget).all()


def test_budgets_double_up_to_the_cap():
    assert ladder(TOLERANT, 1000) == [40, 80]
    assert ladder(TOLERANT, 50) == [40, 50]
    assert ladder(dataclasses.replace(TOLERANT, tolerance_cap=3), 1000) == [40, 60]


def test_what_is_read_counts_earlier_turns_and_draws():
    """Two kv heads of one query head each: one stayed at its first budget, one reached the cap."""
    of_heads = (1, 1, 1, 1, 2)
    found = Measured(
        error=np.array([0.01, 0.04]).reshape(*of_heads, 1),
        bound=np.array([0.05, 0.2]).reshape(*of_heads, 1),
        rows=np.array([10.0, 40]).reshape(of_heads),
        retrieved=np.array([10.0, 70]).reshape(of_heads),
        turns=np.array([3.0, 3]).reshape(of_heads),
    )
    mode = adaptive(found, 0, 0.1, 5)
    assert (mode.error.tolist(), mode.rows.tolist()) == ([0.01, 0.04], [10, 40])
    # Tokens are drawn in both heads in each of three turns.
    assert mode.read.tolist() == [10 + 15, 70 + 15]
    assert mode.capped == 0.5
    assert adaptive(found, 0, 1.0, 5).capped == 0
    both = Mode.joined([mode, fixed(found, 0)])
    assert both.read.tolist() == [25, 85, 10, 40]
    cells = row_of("both", both, 0.02, 0.25)
    assert cells[:3] == ["both", "25.0", "40.0"]
    assert cells[-3:] == ["50.00%", "25.00%", "0.25000"]


def test_true_errors_ask_for_the_first_budget_that_is_within():
    error = np.array([[0.01, 0.3], [0.02, 0.3], [0.03, 0.04]]).reshape(1, 3, 1, 1, 2, 1)
    rows = np.array([[10.0, 10], [20, 20], [40, 40]]).reshape(1, 3, 1, 1, 2)
    found = Measured(error, np.zeros_like(error), rows, rows, np.zeros_like(rows))
    mode = by_truth(found, (0, 1, 2), 0.1)
    assert (mode.error.tolist(), mode.rows.tolist()) == ([0.01, 0.04], [10, 40])
    assert by_truth(found, (0, 1), 0.1).rows.tolist() == [10, 20]
    assert by_truth(found, (0, 1), 0.1).capped == 0.5
