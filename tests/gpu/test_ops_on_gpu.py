"""Every op's kernel on a CUDA GPU against plain JAX in float32, on random inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.rounding import dequantise, quantise
from pallas_kernels.select_clusters import triton as select_clusters
from pallas_kernels.testing import make_step
from pallas_kernels.types import MASKED, NO_ID
from tests.support.gpu_cases import (
    CASES,
    LAYER,
    SEED,
    Case,
    arguments,
    assert_close,
    assert_same,
    assert_table_is_inverse,
    inputs_of,
    references_of,
    run_twice,
    shape,
)

pytestmark = pytest.mark.gpu

KERNEL = "triton"

of_all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def run_kernel(op, case):
    """The kernel's result from the references' results of the ops before it."""
    operands, keywords = arguments(op, case, inputs_of(case), references_of(case))
    function = getattr(ops, op)
    return run_twice(lambda *a: function(*a, **keywords, implementation=KERNEL), *operands)


# One class, so that all the ops of a case come one after the other and share what is cached.
@of_all_cases
class TestOps:
    def test_score_clusters(self, case):
        found, expected = run_kernel("score_clusters", case), references_of(case)["score_clusters"]
        assert_close(found.logits, expected.logits, case.shape.dtype, "logits")
        assert_close(found.logsumexp, expected.logsumexp, case.shape.dtype, "logsumexp")

    @pytest.mark.parametrize("split", [False, True])
    def test_select_clusters(self, case, split):
        """Exactly, on logits whose group masses are far apart; rows whole and split by a sample."""
        x = inputs_of(case)
        logits, logsumexp = separated_logits(case.shape, np.asarray(x.offsets[LAYER]))
        most = {"max_candidates": case.shape.max_candidates}
        config = None
        if split:
            config = select_clusters.Config(chunk=128, in_registers=False, tile=256, sample=128)
        operands = (logits, logsumexp, x.offsets, jnp.int32(LAYER), x.candidate_budget)
        found = run_twice(
            lambda *a: select_clusters.select_clusters(*a, **most, config=config), *operands
        )
        plain = jax.jit(lambda *a: ops.select_clusters(*a, **most, implementation="xla"))
        assert_same(found, plain(*operands))
        held = found.starts[..., -1]
        budget = np.asarray(x.candidate_budget)[:, None]
        assert ((held >= budget) & (held < budget + case.shape.max_cluster_size)).all()

    def test_select_clusters_by_reach(self, case):
        """Exactly: of whole numbers on which heads agree, any arithmetic makes the same ties."""
        x, rng, group = inputs_of(case), np.random.default_rng(6), case.shape.group
        rows, clusters = x.query.shape[:2], x.centroids.shape[3]
        used = np.diff(np.asarray(x.offsets[LAYER]))[:, :, None, :] > 0
        logits = np.where(used, rng.integers(-12, 12, (*rows, 1, clusters)), MASKED)
        lengths = rng.integers(0, 4, (*rows, 1))
        reach = ops.Reach(
            jnp.asarray(np.repeat(lengths, group, axis=2), jnp.float32),
            jnp.asarray(rng.integers(0, 5, x.centroids.shape[:-1]), x.centroids.dtype),
        )
        given = {"max_candidates": case.shape.max_candidates, "reach": reach}
        operands = (
            jnp.asarray(np.repeat(logits, group, axis=2), jnp.float32),
            jnp.zeros((*rows, group), jnp.float32),
            *(x.offsets, jnp.int32(LAYER), x.candidate_budget),
        )
        found = run_twice(
            lambda *a: ops.select_clusters(*a, **given, implementation=KERNEL), *operands
        )
        plain = jax.jit(lambda *a: ops.select_clusters(*a, **given, implementation="xla"))
        assert_same(found, plain(*operands))

    def test_score_tokens(self, case):
        found, expected = run_kernel("score_tokens", case), references_of(case)["score_tokens"]
        assert_close(found, expected, case.shape.dtype, "log_mass")

    def test_select_tokens(self, case):
        found = run_kernel("select_tokens", case)
        expected = references_of(case)["select_tokens"]
        assert_same(found, expected)
        assert_table_is_inverse(found.table)
        for after, before in zip(found.table, inputs_of(case).table, strict=True):
            np.testing.assert_array_equal(after[1 - LAYER], before[1 - LAYER])

    def test_only_rows_worth_reading_are_selected(self, case):
        if not case.cached:
            pytest.skip("no row cache, so nothing is missed")
        operands, _ = arguments("select_tokens", case, inputs_of(case), references_of(case))
        ranked, indexed, table, *at = operands
        # Its slots have all been given away.
        full = table._replace(misses=jnp.full_like(table.misses, table.token_of_slot.shape[-1]))
        operands = (ranked, indexed, full, *at)
        settings = dataclasses.replace(case.shape.selection, admission_ratio=4.0)

        def select(implementation):
            keywords = {"settings": settings, "implementation": implementation}
            return lambda *a: ops.select_tokens(*a, **keywords)

        found = run_twice(select(KERNEL), *operands)
        assert_same(found, jax.jit(select("xla"))(*operands))
        assert_table_is_inverse(found.table)
        every = references_of(case)["select_tokens"]
        assert found.misses.sum() < every.misses.sum() or case.miss_share == 0
        np.testing.assert_array_equal(found.hits, every.hits)

    def test_attend_zones(self, case):
        expected = references_of(case)["attend_zones"]
        found = run_kernel("attend_zones", case)
        output, logsumexp = ops.merge_states(
            jnp.asarray(found.outputs), jnp.asarray(found.logsumexps), implementation="xla"
        )
        best, total = ops.merge_states(expected.outputs, expected.logsumexps, implementation="xla")
        assert_close(output, best, case.shape.dtype, "output")
        assert_close(logsumexp, total, case.shape.dtype, "logsumexp")
        # Rows are copied, not computed: the cache is equal to the bit, NaN included.
        dtype = found.cache_rows.dtype
        admitted = np.asarray(expected.cache_rows.data.astype(dtype))
        np.testing.assert_array_equal(
            found.cache_rows.data[LAYER].astype(np.float32), admitted.astype(np.float32)
        )
        np.testing.assert_array_equal(
            found.cache_rows.data[1 - LAYER].astype(np.float32),
            np.asarray(inputs_of(case).cache_rows[1 - LAYER].astype(jnp.float32)),
        )

    def test_attend_zones_of_levels(self, case):
        """Rows in int8: the kernel folds scales in, and copies levels and scales as they are."""
        if case.shape.dtype == "float16" or case.shape.tokens > 500_000:
            pytest.skip("not for float16; and a million rows in float32 are much for a test")
        made, inputs = references_of(case), inputs_of(case)
        (query, steady, stored, *rest), keywords = arguments("attend_zones", case, inputs, made)
        device, host = jax.memory.Space.Device, jax.memory.Space.Host
        store = jax.jit(quantise)(jax.device_put(stored.store.data, device))
        cache = jax.jit(quantise)(stored.cache.data)
        numbers = ops.StoredRows(*(ops.Rows(dequantise(rows)) for rows in (store, cache)))
        if case.store == "host":
            store = store._replace(data=jax.device_put(store.data, host))

        def attend(implementation):
            return lambda *a: ops.attend_zones(*a, **keywords, implementation=implementation)

        levels = ops.StoredRows(store, cache)
        found = run_twice(attend(KERNEL), query, steady, levels, *rest)
        floats = (jnp.bfloat16, jnp.float16)
        given = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype in floats else x, (query, steady, rest)
        )
        expected = jax.jit(attend("xla"))(*given[:2], numbers, *given[2])
        merged = [
            ops.merge_states(
                jnp.asarray(x.outputs), jnp.asarray(x.logsumexps), implementation="xla"
            )
            for x in (found, expected)
        ]
        for name, one, best in zip(("output", "logsumexp"), *merged, strict=True):
            assert_close(one, best, case.shape.dtype, name)
        copied = jax.tree.map(jnp.asarray, found.cache_rows)
        np.testing.assert_array_equal(dequantise(copied), expected.cache_rows.data)


def separated_logits(shape, offsets):
    """Logits whose group masses are hundreds of roundings apart, in random order; logsumexps."""
    rng = np.random.default_rng(SEED)
    rows = (shape.batch, shape.kv_heads)
    clusters = offsets.shape[-1] - 1
    rank = rng.permuted(np.broadcast_to(np.arange(clusters), (*rows, clusters)), axis=-1)
    # All within e^80, so that no mass underflows.
    spread = min(0.01, 80 / clusters)
    heads = rng.normal(size=(*rows, shape.group, 1))
    logits = heads - spread * rank[:, :, None, :]
    used = np.diff(offsets)[:, :, None, :] > 0
    logits = np.where(used, logits, MASKED)
    logsumexp = rng.normal(size=(*rows, shape.group))
    return jnp.asarray(logits, jnp.float32), jnp.asarray(logsumexp, jnp.float32)


@pytest.mark.parametrize("name", ["phi", "smollm2"])
def test_ties_go_to_the_lower_id(name):
    """One query head and coarse logits make ties that are exact in any arithmetic."""
    s = shape(name, group=1)
    x = make_step(s, SEED, ragged=True)
    key = jax.random.key(SEED)
    logits = jax.random.randint(key, (s.batch, s.kv_heads, 1, s.cluster_room), -3, 4) / 2
    used = jnp.diff(x.offsets[0], axis=-1)[:, :, None] > 0
    logits = jnp.where(used, logits.astype(jnp.float32), MASKED)
    zeros = jnp.zeros((s.batch, s.kv_heads, 1), jnp.float32)
    operands = (logits, zeros, x.offsets, jnp.int32(0), x.candidate_budget)

    def select(implementation):
        most = s.max_candidates
        return lambda *a: ops.select_clusters(
            *a, max_candidates=most, implementation=implementation
        )

    chosen = run_twice(select(KERNEL), *operands)
    assert_same(chosen, select("xla")(*operands))

    coarse = jax.random.randint(key, (s.batch, s.kv_heads, s.max_candidates), -4, 4) / 4
    listed = jnp.arange(s.max_candidates) < chosen.starts[..., -1:]
    log_mass = jnp.where(listed, coarse.astype(jnp.float32), MASKED)
    operands = (
        ops.RankedTokens(log_mass, jax.tree.map(jnp.asarray, chosen), x.retrieved_budget),
        ops.IndexedTokens(x.offsets, x.token_ids, x.prompt_tokens),
        *(x.table, jnp.int32(0), x.step),
    )

    def select(implementation):
        keywords = {"settings": s.selection, "implementation": implementation}
        return lambda *a: ops.select_tokens(*a, **keywords)

    found = run_twice(select(KERNEL), *operands)
    assert_same(found, jax.jit(select("xla"))(*operands))


@pytest.mark.parametrize("zone", ["steady", "retrieved", "estimated", "none"])
def test_each_zone_alone(zone):
    case = Case(shape("smollm2"))
    x = inputs_of(case)
    none = jnp.zeros(case.shape.batch, jnp.int32)
    if zone != "steady":
        x = x._replace(sink_tokens=none, window_tokens=none)
    if zone != "retrieved":
        x = x._replace(
            tokens=jnp.full_like(x.tokens, NO_ID),
            slots=jnp.full_like(x.slots, NO_ID),
            hit=jnp.zeros_like(x.hit),
        )
    if zone != "estimated":
        x = x._replace(remaining=jnp.zeros_like(x.remaining))
    operands, keywords = arguments("attend_zones", case, x, references_of(case))

    def attend(implementation):
        def run(*operands):
            zones = ops.attend_zones(*operands, **keywords, implementation=implementation)
            return ops.merge_states(zones.outputs, zones.logsumexps, implementation="xla")

        return run

    found, expected = run_twice(attend(KERNEL), *operands), jax.jit(attend("xla"))(*operands)
    assert_close(found[0], expected[0], "bfloat16", "output")
    assert_close(found[1], expected[1], "bfloat16", "logsumexp")


@pytest.mark.parametrize("parts, head_dim", [(3, 128), (40, 96)])
def test_merge_states(parts, head_dim):
    """Some parts are empty and poisoned; in one head all are."""
    keys = jax.random.split(jax.random.key(SEED))
    outputs = jax.random.normal(keys[0], (parts, 2, 3, 4, head_dim))
    logsumexps = 5 * jax.random.normal(keys[1], (parts, 2, 3, 4))
    empty = (jnp.arange(parts) % 3 == 1)[:, None, None, None]
    empty = empty | (jnp.arange(4) == 2)
    outputs = jnp.where(empty[..., None], jnp.nan, outputs)
    logsumexps = jnp.where(empty, MASKED, logsumexps)
    found = run_twice(lambda *a: ops.merge_states(*a, implementation=KERNEL), outputs, logsumexps)
    expected = ops.merge_states(outputs, logsumexps, implementation="xla")
    assert_close(found[0], expected[0], "float32", "output")
    assert_close(found[1], expected[1], "float32", "logsumexp")
    np.testing.assert_array_equal(found[0][:, :, 2], 0)
