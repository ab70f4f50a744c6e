"""An audit's errors are the true ones, of a share of the heads; without one nothing is added."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig
from wavejax.engine.facts import facts_of
from wavejax.store.shape import CacheShape

MODEL = model_of(kv_heads=2, group=2, head_dim=16)
SIZES = {
    "sink_tokens": 2, "local_tokens": 8, "growth_tokens": 32, "segment_tokens": 128,
    "cluster_size": 16, "max_cluster_size": 32, "min_clusters": 0, "min_candidate_tokens": 32,
    "min_retrieved_tokens": 16, "cache_fraction": 0.05,
}  # fmt: skip
LENGTHS, STEPS = [200, 3], 60


def run(attention):
    stream = random_stream(MODEL, np.random.default_rng(0), max(LENGTHS) + STEPS, len(LENGTHS))
    state = attention.init_state(CacheShape.of(MODEL), 2, max(LENGTHS), STEPS, jnp.float32)
    _, state = prefill(attention, state, stream, LENGTHS)
    outputs, state = decode(attention, state, stream, jnp.asarray(LENGTHS, jnp.int32), STEPS)
    return np.asarray(outputs, np.float64), state


@pytest.fixture(scope="module")
def truth():
    full, _ = run(DenseAttention())
    found, _ = run(WaveAttention(WaveConfig(**SIZES), "host"))
    return np.linalg.norm(found - full, axis=-1) / np.linalg.norm(full, axis=-1)


def test_of_all_heads_it_tells_every_error(truth):
    _, state = run(WaveAttention(WaveConfig(audit=1.0, **SIZES), "host"))
    count = int(state.audit.count)
    assert count == truth.size
    # A step's heads come in any order.
    errors = np.asarray(state.audit.errors)[:count].reshape(STEPS, -1)
    np.testing.assert_allclose(
        np.sort(errors), np.sort(truth.reshape(STEPS, -1)), rtol=1e-3, atol=1e-5
    )


def test_of_a_share_of_the_heads_it_tells_as_much(truth):
    attention = WaveAttention(WaveConfig(audit=0.1, **SIZES), "device")
    _, state = run(attention)
    count = int(state.audit.count)
    # 480 heads, each audited or not: within four standard deviations.
    assert abs(count - 0.1 * truth.size) < 4 * np.sqrt(0.1 * 0.9 * truth.size)
    facts = facts_of(attention, state)
    assert facts.audited == count
    known = np.sort(truth.ravel())
    for error in np.asarray(state.audit.errors)[:count]:
        near = np.abs(known - error).min()
        assert near < 1e-5 + 1e-3 * error
    assert facts.error_median <= facts.error_99 <= truth.max() * 1.001
    assert known[len(known) // 5] <= facts.error_median <= known[-len(known) // 5]


def test_without_one_the_state_has_no_log():
    attention = WaveAttention(WaveConfig(**SIZES), "device")
    state = attention.init_state(CacheShape.of(MODEL), 1, 10, 10, jnp.float32)
    assert state.audit is None
    facts = facts_of(attention, state)
    assert (facts.audited, facts.error_median, facts.error_99) == (0, None, None)


def test_staged_rows_are_refused():
    with pytest.raises(InputError, match="`audit` is not 0 and rows in host memory are staged"):
        WaveAttention(WaveConfig(audit=0.5), "host", "staged")
