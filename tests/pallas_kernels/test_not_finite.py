"""NaN and infinity are said, never hidden: each op, in plain JAX and interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attend_dense import reference as dense_reference
from pallas_kernels.attend_dense import triton as dense_kernel
from pallas_kernels.merge_states import reference as merge_reference
from pallas_kernels.merge_states import triton as merge_kernel
from pallas_kernels.numerics import from_ordered_bits, log_sum_exp, ordered_bits
from pallas_kernels.score_clusters import reference as score_reference
from pallas_kernels.score_clusters import triton as score_kernel
from pallas_kernels.select_clusters.reference import list_candidates
from pallas_kernels.select_tokens.reference import empty_table
from pallas_kernels.select_tokens.reference import select_tokens as select_plain
from pallas_kernels.select_tokens.triton import select_tokens as select_kernel
from pallas_kernels.types import MASKED, IndexedTokens, RankedTokens, Rows, SelectionSettings
from tests.pallas_kernels.attend_zones.test_kernel import (
    COUNTS,
    HEADS,
    LAYER,
    QUICKLY,
    run_kernel,
    run_reference,
    zone_case,
)

BAD = [np.nan, np.inf]
ZONES = {"plain": run_reference, "kernel": run_kernel}
DENSE = {
    "plain": dense_reference.attend_dense,
    "kernel": functools.partial(dense_kernel.attend_dense, interpret=True),
}
MERGE = {
    "plain": merge_reference.merge_states,
    "kernel": functools.partial(merge_kernel.merge_states, interpret=True),
}
SCORE = {
    "plain": score_reference.score_clusters,
    "kernel": functools.partial(score_kernel.score_clusters, interpret=True),
}
STEADY = ("sink", "window")
# The NaN that processors make, that GPUs make, and others of either sign.
NANS = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF, 0x7F800001], np.uint32)


def test_log_sum_exp_tells_nothing_from_nan():
    rows = jnp.array(
        [[MASKED, MASKED], [MASKED, 2.0], [np.nan, 2.0], [MASKED, np.nan], [np.inf, 2.0]],
        jnp.float32,
    )
    found = np.asarray(log_sum_exp(rows, axis=1))
    np.testing.assert_array_equal(found, np.float32([MASKED, 2.0, np.nan, np.nan, np.nan]))


def test_ordered_bits_put_nan_below_every_number():
    numbers = np.float32([-np.inf, -3e38, -1.0, 0.0, 2e-38, 1.0, 3e38, np.inf])
    keys = np.asarray(ordered_bits(jnp.asarray(numbers)), np.int64)
    assert (np.diff(keys) > 0).all()
    of_nan = np.asarray(ordered_bits(jnp.asarray(NANS.view(np.float32))), np.int64)
    assert (of_nan < keys[0]).all()
    assert (of_nan > 0).all()  # zero is the key of what does not exist
    assert keys[-1] < 2**32 - 1
    assert np.isnan(from_ordered_bits(jnp.asarray(of_nan, jnp.uint32))).all()


@pytest.mark.parametrize("merge", MERGE.values(), ids=MERGE)
def test_merging_keeps_nan_and_leaves_empty_parts_out(merge):
    rng = np.random.default_rng(0)
    shape = 3, 1, 1, 4
    outputs = rng.normal(size=(*shape, 64)).astype(np.float32)
    logsumexps = rng.normal(size=shape).astype(np.float32)
    logsumexps[1] = MASKED
    outputs[1] = np.nan  # an empty part may hold anything
    logsumexps[2, 0, 0, 1] = np.nan
    outputs[0, 0, 0, 2, 5] = np.nan
    logsumexps[:, 0, 0, 3] = MASKED
    output, logsumexp = map(np.asarray, merge(jnp.asarray(outputs), jnp.asarray(logsumexps)))
    weights = np.exp(logsumexps[[0, 2], 0, 0, 0].astype(np.float64))
    expected = weights @ outputs[[0, 2], 0, 0, 0].astype(np.float64) / weights.sum()
    np.testing.assert_allclose(output[0, 0, 0], expected, atol=1e-5)
    assert np.isnan(output[0, 0, 1]).all()
    assert np.isnan(logsumexp[0, 0, 1])
    assert np.isnan(output[0, 0, 2, 5])
    assert np.isfinite(np.delete(output[0, 0, 2], 5)).all()
    assert (output[0, 0, 3] == 0).all()
    assert logsumexp[0, 0, 3] < MASKED / 2


def spoil(case, where, bad):
    """The case with one bad number in what sequence 0's kv head 0 attends to; the window's zone
    is the same for all sequences, so is the row that is read."""
    case = {name: np.array(x) for name, x in case.items()}
    at = (LAYER, 0, 0)
    picks = np.flatnonzero(case["hit"][0, 0])
    misses = np.flatnonzero(~case["hit"][0, 0] & (case["tokens"][0, 0] < 2**31 - 1))
    kept = np.flatnonzero(case["remaining"][0, 0])
    place = {
        "sink": ("sink", (*at, 1, 0, 3)),
        "window": ("window", (*at, 74, 0, 3)),
        "value": ("window", (*at, 74, 1, 3)),
        "hit": ("cache_rows", (*at, case["slots"][0, 0, picks[0]], 0, 3)),
        "miss": ("store", (*at, case["tokens"][0, 0, misses[0]], 0, 3)),
        "estimate": ("logits", (0, 0, slice(None), kept[-1])),
        "mean value": ("value_means", (*at, kept[-1], 3)),
    }
    name, index = place[where]
    case[name][index] = bad
    return {name: jnp.asarray(x) for name, x in case.items()}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("zones", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize(
    "where", ["sink", "window", "value", "hit", "miss", "estimate", "mean value"]
)
def test_a_bad_number_reaches_the_head_that_attends_to_it_and_no_other(where, zones, bad):
    case = zone_case(3)

    def attend(case):
        found = zones(case)
        return np.asarray(merge_reference.merge_states(found.outputs, found.logsumexps)[0])

    clean, found = attend(case), attend(spoil(case, where, bad))
    assert np.isfinite(clean).all()
    if where in ("value", "mean value"):
        assert not np.isfinite(found[0, 0, :, 3]).any()
    else:
        # An infinite key may weigh nothing at all: a query then has a sound answer without it.
        hidden = np.isfinite(found[0, 0]).all(axis=-1)
        assert not hidden.any() if np.isnan(bad) else hidden.mean() < 1
    others = np.ones((len(COUNTS), HEADS), bool)
    others[0, 0] = False
    np.testing.assert_array_equal(found[others], clean[others])


@pytest.mark.parametrize("zones", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize("name", STEADY)
def test_more_rows_than_there_are_are_all_of_them(name, zones):
    case = zone_case(5)
    counts = case[f"{name}_tokens"]
    full = case | {
        name: jnp.nan_to_num(case[name]),
        f"{name}_tokens": jnp.full_like(counts, case[name].shape[3]),
    }
    past = full | {f"{name}_tokens": full[f"{name}_tokens"] + 37}
    for x, y in zip(zones(past)[:2], zones(full)[:2], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("attend", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("kv", [0, 1], ids=["key", "value"])
def test_full_attention_says_nan(attend, kv):
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(2, 2, 3, 64)), jnp.float32)
    rows = rng.normal(size=(2, 2, 2, 2, 40, 64)).astype(np.float32)
    lengths = jnp.array([40, 30])
    rows[:, :, 1, :, 30:] = np.nan  # past a sequence's end anything may lie
    bad = rows.copy()
    bad[kv, 1, 0, 1, 20, 5] = np.nan
    clean, found = (
        attend(query, *(Rows(jnp.asarray(one)) for one in x), lengths, 1, scale=0.2)
        for x in (rows, bad)
    )
    assert np.isfinite(clean[0]).all()
    assert np.isnan(found[0][0, 1, :, 5]).all()
    assert np.isnan(found[1][0, 1]).all() == (kv == 0)
    others = np.ones((2, 2), bool)
    others[0, 1] = False
    for x, y in zip(found, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others])


@pytest.mark.parametrize("score", SCORE.values(), ids=SCORE)
def test_a_centroid_of_nan_shows_in_its_rows_sum(score):
    rng = np.random.default_rng(2)
    query = jnp.asarray(rng.normal(size=(2, 1, 4, 64)), jnp.float32)
    centroids = rng.normal(size=(1, 2, 1, 40, 64)).astype(np.float32)
    centroids[0, 0, 0, 7, 9] = np.nan
    centroids[0, :, :, 30:] = np.nan  # not in use
    edges = np.minimum(np.arange(41), 30) * 5
    offsets = jnp.asarray(np.broadcast_to(edges, (1, 2, 1, 41)), jnp.int32)
    found = score(query, jnp.asarray(centroids), offsets, 0, scale=0.1)
    assert np.isnan(found.logsumexp[0]).all()
    assert np.isfinite(found.logsumexp[1]).all()
    assert np.isnan(found.logits[0]).sum() == 4


SELECT = {
    name: jax.jit(functools.partial(select, settings=SelectionSettings(63, 64, 64)), **QUICKLY)
    for name, select in (
        ("plain", select_plain),
        ("kernel", functools.partial(select_kernel, interpret=True)),
    )
}


@pytest.mark.parametrize("nan", NANS)
@pytest.mark.parametrize("budget", [1, 5, 63])
def test_nan_is_selected_last(nan, budget):
    heads, tokens, clusters = 2, 64, 8
    edges = np.arange(0, tokens + 1, tokens // clusters)
    offsets = jnp.asarray(np.broadcast_to(edges, (1, 1, heads, clusters + 1)), jnp.int32)
    ids = jnp.asarray(np.broadcast_to(np.arange(tokens), (1, 1, heads, tokens)), jnp.uint16)
    chosen = jnp.ones((1, heads, clusters), bool)
    mass = np.random.default_rng(3).normal(size=(1, heads, tokens)).astype(np.float32) - 8
    mass.view(np.uint32)[0, 0, 17] = nan
    mass[0, 1, 5] = -np.inf
    operands = (
        RankedTokens(
            jnp.asarray(mass),
            list_candidates(chosen, jnp.diff(offsets[0]), tokens),
            jnp.array([budget]),
        ),
        IndexedTokens(offsets, ids, jnp.array([tokens])),
        empty_table((1, 1, heads), tokens, 8),
        0,
        jnp.int32(0),
    )
    order = np.argsort(np.nan_to_num(-mass[0], nan=np.inf, posinf=3e38), axis=-1, kind="stable")
    expected = np.sort(order[:, :budget], axis=-1)
    for select in SELECT.values():
        found = np.asarray(select(*operands).tokens)
        np.testing.assert_array_equal(found[0, :, :budget], expected)


@pytest.mark.parametrize("zones", ZONES.values(), ids=ZONES)
def test_a_cluster_of_the_most_tokens_is_estimated_in_float16(zones):
    case = zone_case(9, dtype="float16")
    edges = np.zeros(case["offsets"].shape, np.int32)
    edges[..., 1:] = 65536
    remaining = jnp.zeros_like(case["remaining"]).at[..., 0].set(65536)
    nothing = {f"{name}_tokens": jnp.zeros_like(case[f"{name}_tokens"]) for name in STEADY}
    case |= nothing | {"offsets": jnp.asarray(edges), "remaining": remaining}
    case["tokens"] = jnp.full_like(case["tokens"], 2**31 - 1)
    case["hit"] = jnp.zeros_like(case["hit"])
    case["value_means"] = case["value_means"].at[:, :, :, 0].set(2000.0)
    case["logits"] = case["logits"].at[..., 0].set(3.0)
    found = zones(case)
    output, logsumexp = merge_reference.merge_states(found.outputs, found.logsumexps)
    np.testing.assert_allclose(output, 2000.0, rtol=1e-3)
    np.testing.assert_allclose(logsumexp, 3.0 + np.log(65536), rtol=1e-5)
