"""The facts of a state, on states small enough to count by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import ATTENTIONS, CONFIG, MODEL
from wavejax import WaveAttention
from wavejax.cli.run import audit_text
from wavejax.engine.facts import facts_of
from wavejax.store.audit import KEPT, AuditLog
from wavejax.store.shape import CacheShape


def state_with(hits, misses, attended, store="device", cached=True):
    """An empty state of two layers, two kv heads and a batch of two, with these counts."""
    attention = WaveAttention(CONFIG, store, cached=cached)
    state = attention.init_state(CacheShape.of(MODEL), 2, 128, 64, jnp.float32)
    # Of each sequence, all in its first kv head.
    hits, misses = (
        jnp.zeros((2, 2, 2), jnp.uint32).at[..., 0].set(jnp.asarray(x, jnp.uint32))
        for x in (hits, misses)
    )
    table = state.cache.table._replace(hits=hits, misses=misses)
    cache = dataclasses.replace(state.cache, table=table)
    attended = jnp.asarray(attended, jnp.float32)
    return dataclasses.replace(state, cache=cache, attended=attended)


def test_shares_of_counts():
    # 24 of 40 retrieved rows were cached; 2 layers and 2 kv heads read 4 * (150 + 50) tokens.
    facts = facts_of(
        ATTENTIONS["wave"], state_with([[1, 2], [10, 11]], [[4, 4], [4, 4]], [150, 50])
    )
    assert facts.hit_ratio == pytest.approx(24 / 40)
    assert facts.retrieved_share == pytest.approx(40 / 800)


def test_counts_add_up_past_32_bits():
    many = np.full((2, 2), 2**32 - 1, np.uint32)
    facts = facts_of(ATTENTIONS["wave"], state_with(many, np.zeros((2, 2)), [2.0**32, 2.0**32]))
    assert facts.hit_ratio == 1
    assert facts.retrieved_share == pytest.approx(0.5)


def test_without_a_cache_there_is_no_hit_ratio():
    zeros, fives = np.zeros((2, 2)), np.full((2, 2), 5)
    facts = facts_of(ATTENTIONS["wave"], state_with(zeros, fives, [50, 50], cached=False))
    assert facts.hit_ratio is None
    assert facts.retrieved_share == pytest.approx(20 / 400)


def test_before_the_first_step_there_are_no_shares():
    zeros = np.zeros((2, 2))
    facts = facts_of(ATTENTIONS["wave"], state_with(zeros, zeros, [0, 0]))
    assert facts.hit_ratio is None
    assert facts.retrieved_share is None


def test_nothing_retrieved_has_a_share_but_no_hit_ratio():
    zeros = np.zeros((2, 2))
    facts = facts_of(ATTENTIONS["wave"], state_with(zeros, zeros, [10, 10]))
    assert facts.hit_ratio is None
    assert facts.retrieved_share == 0


@pytest.mark.parametrize("store", ["host", "device"])
def test_bytes_by_memory(store):
    state = state_with(np.zeros((2, 2)), np.zeros((2, 2)), [0, 0], store)
    rows = state.store.rows.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    facts = facts_of(ATTENTIONS["wave"], state)
    assert facts.host_bytes == (rows if store == "host" else 0)
    assert facts.device_bytes == total - facts.host_bytes


@pytest.mark.parametrize("count", [0, 3, 2 * KEPT + 5])
def test_an_audits_quantiles_are_of_the_errors_that_it_keeps(count):
    errors = np.full(KEPT, 7.0, np.float32)
    errors[:100] = np.arange(100) / 100
    log = AuditLog(jnp.asarray(errors), jnp.zeros(KEPT, jnp.int32), jnp.int32(count))
    state = dataclasses.replace(state_with(np.zeros((2, 2)), np.zeros((2, 2)), [1, 1]), audit=log)
    facts = facts_of(ATTENTIONS["wave"], state)
    kept = min(count, KEPT)
    assert facts.audited == kept
    if not count:
        assert facts.error_median is facts.error_99 is None
        assert audit_text(facts) == []
        return
    assert facts.error_median == pytest.approx(np.median(errors[:kept]))
    assert facts.error_99 == pytest.approx(np.quantile(errors[:kept], 0.99))
    if count == 3:
        said = "true error of 3 heads: median 1.00%, 99 % of them 1.98% or less"
        assert audit_text(facts) == [said]


def test_full_attention_retrieves_all():
    attention = ATTENTIONS["dense"]
    facts = facts_of(attention, attention.init_state(CacheShape.of(MODEL), 2, 128, 64, jnp.float32))
    assert facts.retrieved_share == 1
    assert facts.hit_ratio is None
    assert facts.host_bytes == 0
    # Keys and values of 192 tokens, and two lengths.
    row = MODEL.num_layers * 2 * MODEL.num_kv_heads * MODEL.head_dim
    assert facts.device_bytes == 2 * row * 192 * 4 + 2 * 4
