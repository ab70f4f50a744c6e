"""NaN and infinity on a GPU: the kernels say what plain JAX says, and no token is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.build_clusters import capacity
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.select_clusters.reference import list_candidates
from pallas_kernels.select_tokens.reference import empty_table
from tests.pallas_kernels.attend_zones.test_kernel import COUNTS, HEADS, LAYER, zone_case
from tests.pallas_kernels.test_not_finite import NANS, spoil
from tests.support.spoilt_clusters import BAD_KEY, BAD_VALUE, check_spoilt
from tests.support.zone_operands import zone_operands

pytestmark = pytest.mark.gpu

KERNEL = "triton"


@functools.partial(jax.jit, static_argnames="implementation")
def attend(case, implementation):
    operands = zone_operands(case)
    zones = ops.attend_zones(*operands, LAYER, scale=0.2, implementation=implementation)
    return ops.merge_states(zones.outputs, zones.logsumexps, implementation=implementation)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_bad_number_reaches_its_own_head_alone(dtype):
    case = zone_case(3, dtype=dtype)
    clean = [np.asarray(x) for x in attend(case, KERNEL)]
    assert np.isfinite(clean[0]).all()
    others = np.ones((len(COUNTS), HEADS), bool)
    others[0, 0] = False
    for where in ("sink", "window", "value", "hit", "miss", "estimate", "mean value"):
        found = [np.asarray(x) for x in attend(spoil(case, where, np.nan), KERNEL)]
        own = found[0][0, 0]
        assert np.isnan(own[:, 3] if "value" in where else own).all(), where
        for x, y in zip(found, clean, strict=True):
            np.testing.assert_array_equal(x[others], y[others], err_msg=where)


def test_more_rows_than_there_are_are_all_of_them():
    case = zone_case(5)
    counts = jnp.full_like(case["window_tokens"], case["window"].shape[3])
    full = case | {"window": jnp.nan_to_num(case["window"]), "window_tokens": counts}
    past = attend(full | {"window_tokens": counts + 37}, KERNEL)
    for x, y in zip(past, attend(full, KERNEL), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clusters_beside_a_bad_key_or_value(dtype, bad):
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 1024, 64)).astype(np.float32)
    clean = [jnp.asarray(x, dtype) for x in (keys, values)]
    keys[BAD_KEY], values[BAD_VALUE] = bad, bad
    counts = np.array([1024, 1024, 700])
    mean, most = jnp.array([8, 16, 32]), jnp.array([16, 32, 64])
    found = jax.jit(
        lambda k, v, n: ops.build_clusters(
            k,
            v,
            n,
            cluster_size=mean,
            max_cluster_size=most,
            least_sizes=(8, 16),
            iterations=5,
            implementation=KERNEL,
        )
    )(jnp.asarray(keys, dtype), jnp.asarray(values, dtype), jnp.asarray(counts))
    assert found.centroids.shape[1] == capacity(1024, 8, 16)
    for row in range(3):
        assert np.diff(found.offsets[row]).max() <= int(most[row])
    check_spoilt(found, *clean, counts)


@pytest.mark.parametrize("budget", [1, 5, 900])
def test_nan_is_selected_last(budget):
    heads, tokens, clusters = 5, 4096, 128
    edges = np.arange(0, tokens + 1, tokens // clusters)
    offsets = jnp.asarray(np.broadcast_to(edges, (1, 1, heads, clusters + 1)), jnp.int32)
    ids = jnp.asarray(np.broadcast_to(np.arange(tokens), (1, 1, heads, tokens)), jnp.uint16)
    mass = np.random.default_rng(budget).normal(size=(1, heads, tokens)).astype(np.float32) - 8
    for head, nan in enumerate(NANS):
        mass.view(np.uint32)[0, head, 17::500] = nan
    found = ops.select_tokens(
        ops.RankedTokens(
            jnp.asarray(mass),
            list_candidates(jnp.ones((1, heads, clusters), bool), jnp.diff(offsets[0]), tokens),
            jnp.array([budget]),
        ),
        ops.IndexedTokens(offsets, ids, jnp.array([tokens])),
        empty_table((1, 1, heads), tokens, 8),
        0,
        jnp.int32(0),
        settings=ops.SelectionSettings(1000, tokens, tokens),
        implementation=KERNEL,
    )
    order = np.argsort(np.nan_to_num(-mass[0], nan=np.inf), axis=-1, kind="stable")
    expected = np.sort(order[:, :budget], axis=-1)
    np.testing.assert_array_equal(np.asarray(found.tokens)[0, :, :budget], expected)


def test_a_code_of_what_is_not_finite_has_a_scale_of_nan():
    keys = jnp.ones((1, 4, 64)).at[0, 1, 5].set(jnp.nan).at[0, 2, 5].set(jnp.inf)
    matrix = jnp.asarray(rotation(64))
    scales = ops.encode_tokens(keys, jnp.zeros_like(keys), matrix, implementation=KERNEL).scales
    assert np.isfinite(scales[0]).tolist() == [True, False, False, True]
