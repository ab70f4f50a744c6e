"""A tolerance: errors within it as often as it says, more tokens where needed, exact past those."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig
from wavejax.attention.tolerance import next_budget
from wavejax.engine.facts import facts_of
from wavejax.store.shape import CacheShape
from wavejax.store.tolerance import begin, init_tolerance, shares_of

MODEL = model_of(kv_heads=2, group=2, head_dim=16)
CONFIG = WaveConfig(
    sink_tokens=2, local_tokens=8, growth_tokens=32, segment_tokens=256, cluster_size=8,
    max_cluster_size=16, min_clusters=0, min_candidate_tokens=64, min_retrieved_tokens=16,
    retrieval_fraction=0.0, cache_fraction=0.05, tolerance_draws=64, tolerance_cap=4,
)  # fmt: skip
LENGTHS, STEPS = [500, 300], 40


@pytest.fixture(scope="module")
def stream():
    """Queries sharper than random ones, so that few tokens have most of the mass."""
    rng = np.random.default_rng(0)
    query, key, value = random_stream(MODEL, rng, max(LENGTHS) + STEPS, len(LENGTHS))
    return 2.5 * query, key, value + 1


def run(attention, stream, lengths=tuple(LENGTHS), limits=None):
    stream = tuple(x[: len(lengths)] for x in stream)
    # No prompt's state depends on the tolerance: one program reads it for all.
    reader = attention
    if isinstance(attention, WaveAttention):
        plain = dataclasses.replace(CONFIG, moment_rank=attention.config.moment_rank)
        reader = dataclasses.replace(attention, config=plain)
    state = reader.init_state(CacheShape.of(MODEL), len(lengths), max(lengths), STEPS, jnp.float32)
    _, state = prefill(reader, state, stream, list(lengths))
    if reader is not attention:
        log = init_tolerance(attention.config.tolerance, len(lengths))
        if limits is not None:
            log = dataclasses.replace(log, limits=jnp.asarray(limits, jnp.float32))
        state = dataclasses.replace(state, tolerance=log)
    outputs, state = decode(attention, state, stream, jnp.asarray(lengths, jnp.int32), STEPS)
    return np.asarray(outputs, np.float64), state


@pytest.fixture(scope="module")
def full(stream):
    return run(DenseAttention(), stream)[0]


def errors(found, full):
    return np.linalg.norm(found - full, axis=-1) / np.linalg.norm(full, axis=-1)


def with_tolerance(tolerance, store="device", **changes):
    return WaveAttention(dataclasses.replace(CONFIG, tolerance=tolerance, **changes), store)


@pytest.mark.parametrize("better", [{}, {"moment_rank": 2}, {"pooled_covariance": True}])
def test_errors_are_within_it(stream, full, better):
    """Of heads that say so all but delta are; that more tokens are retrieved brings more within."""
    plain = errors(run(WaveAttention(CONFIG, "device"), stream)[0], full)
    attention = with_tolerance(0.2, **better)
    found, state = run(attention, stream)
    error, facts = errors(found, full), facts_of(attention, state)
    assert facts.more > 0.1
    assert facts.within > 0.3
    assert facts.computed == 0
    # Past it are only heads that say so, and delta of the others.
    assert np.mean(error > 0.2) <= (1 - facts.within) + CONFIG.delta
    assert np.mean(error > 0.2) < np.mean(plain > 0.2) / 2


def test_past_the_cap_heads_are_computed(stream, full):
    attention = with_tolerance(1e-6, exact_fallback=True)
    found, state = run(attention, stream)
    assert errors(found, full).max() < 1e-5
    facts = facts_of(attention, state)
    assert facts.within == 1
    assert facts.computed > 0.9
    # At first 16 tokens; so far past it a head goes to the cap at once, four times as many.
    kv_heads = STEPS * len(LENGTHS) * MODEL.num_kv_heads
    misses = np.asarray(state.cache.table.misses, np.int64).sum()
    assert misses == (16 + 64) * kv_heads


def test_a_head_retrieves_as_many_times_as_many_as_its_bound_is_past():
    limit = jnp.array([0.1, 0.5, jnp.inf])[:, None, None]
    bound = jnp.array([[[0.05, 0.3], [0.1, 0.02]], [[jnp.inf, 0], [0.6, jnp.nan]], [[9, 9]] * 2])
    budget = jnp.array([[10, 10], [10, 35], [10, 10]], jnp.int32)
    found = next_budget(limit, budget, bound, 60)
    # Three times; within; the cap; twice at least and the cap; never.
    assert found.tolist() == [[pytest.approx(30, abs=1), 0], [60, 60], [0, 0]]
    # At the cap there is no more, and a NaN asks for none.
    assert next_budget(limit, jnp.full((3, 2), 60), bound, 60).tolist() == [[0, 0]] * 3
    alone = next_budget(limit[:1], budget[:1], jnp.array([[[jnp.nan, 0.0], [0.11, 0.0]]]), 60)
    assert alone.tolist() == [[0, 20]]
    # A cap that float32 does not hold is reached all the same, and no more is asked for then.
    large = 2**24 + 1
    alone = next_budget(limit[:1], jnp.full((1, 1), 2**24, jnp.int32), bound[:1, 1:] + 1, large)
    assert alone.tolist() == [[large]]
    assert next_budget(limit[:1], alone, bound[:1, 1:] + 1, large).tolist() == [[0]]


def test_a_wide_one_changes_nothing(stream):
    plain, _ = run(WaveAttention(CONFIG, "device"), stream)
    attention = with_tolerance(1.0, tolerance_cap=1)
    found, state = run(attention, stream)
    np.testing.assert_array_equal(found, plain)
    log = state.tolerance
    assert log.heads.tolist() == [STEPS * MODEL.num_heads] * len(LENGTHS)
    assert not log.computed.any()
    assert not log.after_more.any()


def test_a_batch_changes_nothing(stream):
    """Each sequence has the draws, the budget and the output that it has alone."""
    attention = with_tolerance(0.2)
    both, _ = run(attention, stream)
    alone, _ = run(attention, stream, LENGTHS[:1])
    np.testing.assert_allclose(both[:, 0], alone[:, 0], atol=1e-6)


def test_each_sequence_has_its_own(stream):
    """Without a limit the first one is as by no tolerance, and the second as by its own."""
    attention = with_tolerance(0.2)
    plain, _ = run(WaveAttention(CONFIG, "device"), stream)
    bounded, _ = run(attention, stream)
    found, state = run(attention, stream, limits=[np.inf, 0.2])
    np.testing.assert_allclose(found[:, 0], plain[:, 0], atol=1e-6)
    np.testing.assert_array_equal(found[:, 1], bounded[:, 1])
    assert np.abs(bounded[:, 0] - plain[:, 0]).max() > 1e-3
    assert shares_of(state.tolerance, 0) == (1.0, 0.0, 0.0, 0.0)
    at_once, more, computed, never = shares_of(state.tolerance, 1)
    assert more > 0
    assert at_once < 1
    assert computed == 0
    assert at_once + more + never == pytest.approx(1)
    both = np.asarray([at_once + 1, more, 0, never]) / 2
    np.testing.assert_allclose(shares_of(state.tolerance), both)


def test_a_slots_next_sequence_counts_anew(stream):
    _, state = run(with_tolerance(0.2), stream)
    other = shares_of(state.tolerance, 0)
    log = begin(state.tolerance, jnp.int32(1), jnp.float32(0.5))
    assert log.limits.tolist() == pytest.approx([0.2, 0.5])
    assert shares_of(log, 1) is None
    assert shares_of(log, 0) == shares_of(log) == other


def test_rows_in_host_memory_give_the_same(stream):
    device, _ = run(with_tolerance(0.2), stream)
    host, state = run(with_tolerance(0.2, "host"), stream)
    np.testing.assert_allclose(host, device, atol=1e-6)
    assert int(np.asarray(state.cache.table.hits).sum()) > 0


def test_without_one_there_is_no_log():
    attention = WaveAttention(CONFIG, "device")
    state = attention.init_state(CacheShape.of(MODEL), 1, 10, 10, jnp.float32)
    assert state.tolerance is None
    assert facts_of(attention, state).within is None


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(InputError, match="`tolerance` is not 0 and rows in host memory are staged"):
        WaveAttention(WaveConfig(tolerance=0.1), "host", "staged")
    with pytest.raises(InputError, match="wants all tokens estimated"):
        WaveConfig(tolerance=0.1, estimation_fraction=0.5)
    for name, value in (("delta", 0.0), ("tolerance_draws", 1), ("tolerance_cap", 0)):
        with pytest.raises(InputError, match=f"`{name}`"):
            WaveConfig(**{name: value})
