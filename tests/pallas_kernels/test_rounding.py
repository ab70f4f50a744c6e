"""Rows in 8 bits: `quantise` against numpy, and ops on levels against ops on their numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from pallas_kernels.append_rows import reference as append_reference
from pallas_kernels.append_rows import triton as append_kernel
from pallas_kernels.attend_zones import reference
from pallas_kernels.attend_zones import triton as zones_kernel
from pallas_kernels.rounding import dequantise, quantise
from pallas_kernels.types import NO_ID
from tests.pallas_kernels.attend_zones.test_kernel import (
    LAYER,
    QUICKLY,
    SPLIT,
    TOLERANCES,
    check_zones,
    shapes,
    without_cache,
    zone_case,
)
from tests.support.lowering import lower_for
from tests.support.zone_operands import zone_operands


def rounded(vector):
    """One vector's levels and scale, in float64: the scale to 16 bits, ties to even."""
    largest = np.max(np.abs(vector)).astype(np.float64) / 127
    if largest < 2.0**-126:
        return np.zeros(len(vector)), 0.0
    mantissa, exponent = np.frexp(largest)
    scale = np.ldexp(np.round(mantissa * 2**16), exponent - 16)
    return np.round(vector.astype(np.float64) / scale), scale


NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)


@settings(max_examples=200, deadline=None)
@given(vector=st.lists(NUMBERS, min_size=4, max_size=4), bits=st.sampled_from([16, 32]))
def test_levels_and_scales(vector, bits):
    dtype = jnp.bfloat16 if bits == 16 else jnp.float32
    given_numbers = jnp.asarray(vector, dtype)
    found = quantise(given_numbers)
    numbers = np.asarray(given_numbers, np.float32)
    levels, scale = rounded(numbers)
    # 1 / 127 in float32 moves what is halfway between two scales.
    np.testing.assert_allclose(found.scales, scale, rtol=2.0**-15, atol=1.2e-38)
    np.testing.assert_allclose(found.data, levels, atol=1)
    assert np.max(np.abs(np.asarray(found.data, int))) == (127 if found.scales > 0 else 0)
    # By the scale that it found: half of it at most, but for float32's last bit.
    if found.scales > 0:
        error = np.abs(np.asarray(dequantise(found), np.float64) - numbers)
        assert (error <= float(found.scales) * (0.5 + 1e-3)).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(-100, 100))
def test_rounded_rows_round_to_themselves(seed, size):
    """What leaves the store and comes back is as it was, whichever program rounds."""
    vectors = np.random.default_rng(seed).normal(size=(50, 8)) * 2.0**size
    first = quantise(jnp.asarray(vectors, jnp.float32))
    again = jax.jit(quantise)(dequantise(first))
    np.testing.assert_array_equal(again.data, first.data)
    np.testing.assert_array_equal(again.scales, first.scales)
    exact = np.asarray(first.data, np.float64) * np.asarray(first.scales, np.float64)[:, None]
    np.testing.assert_array_equal(np.asarray(dequantise(first), np.float64), exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_stays_so(bad):
    rows = jnp.asarray([[1.0, bad, 2.0], [1.0, 0.5, 2.0], [0.0, 0.0, 0.0]])
    found = quantise(rows)
    assert np.isnan(dequantise(found)[0]).all()
    np.testing.assert_allclose(dequantise(found)[1:], rows[1:], atol=0.01)
    assert found.scales[2] == 0


def scaled(case, as_levels=True):
    """A case whose stored rows are rounded: levels and scales, or the numbers they stand for."""
    store, cache = (quantise(case[name]) for name in ("store", "cache_rows"))
    if not as_levels:
        return case | {"store": dequantise(store), "cache_rows": dequantise(cache)}
    names = {"store": store.data, "store_scales": store.scales}
    return case | names | {"cache_rows": cache.data, "cache_scales": cache.scales}


def run_reference(case):
    return reference.attend_zones(*zone_operands(case), jnp.int32(LAYER), scale=0.2)


@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    cached=st.booleans(),
)
def test_zones_are_exactly_those_of_the_rounded_rows(seed, dtype, cached):
    """Number for number, hits and misses alike; and so is the row cache that is left."""
    case = zone_case(seed, group=2, head_dim=64, dtype=dtype)
    case = case if cached else without_cache(case)
    run = jax.jit(run_reference, **QUICKLY)
    found, expected = run(scaled(case)), run(scaled(case, as_levels=False))
    np.testing.assert_array_equal(found.outputs, expected.outputs)
    np.testing.assert_array_equal(found.logsumexps, expected.logsumexps)
    assert np.isfinite(found.outputs).all()
    np.testing.assert_array_equal(dequantise(found.cache_rows), expected.cache_rows.data)
    assert found.cache_rows.format == "scaled"


@functools.partial(jax.jit, static_argnums=1, **QUICKLY)
def run_kernel(case, config):
    operands = zone_operands(case)
    return zones_kernel.attend_zones(*operands, LAYER, scale=0.2, config=config, interpret=True)


@pytest.mark.parametrize(
    "group, head_dim, dtype, cached",
    [(3, 96, "float32", True), (7, 128, "bfloat16", True), (2, 64, "bfloat16", False)],
)
def test_the_kernel_folds_scales_in(group, head_dim, dtype, cached):
    case = zone_case(group, group, head_dim, dtype)
    case = scaled(case if cached else without_cache(case))
    found, expected = run_kernel(case, SPLIT), jax.jit(run_reference, **QUICKLY)(case)
    config = SPLIT if cached else dataclasses.replace(SPLIT, missed_splits=0)
    check_zones(found, expected, config, TOLERANCES[dtype])
    np.testing.assert_array_equal(found.cache_rows.scales, expected.cache_rows.scales)


def test_the_kernel_shows_a_row_that_is_not_finite():
    """It is a number nowhere: a key's scale makes all of a row's output NaN, and so a value's."""
    case = zone_case(5, 2, 64)
    place = int(np.flatnonzero(np.asarray(case["hit"][0, 0]))[0])
    slot = int(case["slots"][0, 0, place])
    for kv in (0, 1):
        spoilt = case["cache_rows"].at[LAYER, 0, 0, slot, kv, 3].set(jnp.inf)
        found = run_kernel(scaled(case | {"cache_rows": spoilt}), SPLIT)
        bad = ~np.isfinite(np.asarray(found.outputs)).all(axis=(0, -1))
        assert bad[0, 0].all()
        assert not bad[0, 1].any()
        assert not bad[1:].any()


def test_what_the_kernel_does_not_take():
    case = scaled(zone_case(0, dtype="float16"))
    with pytest.raises(NotImplementedError, match="rows have scales and query is float16"):
        zones_kernel.attend_zones(*zone_operands(case), 0, scale=1.0)
    halves = scaled(zone_case(0)) | {"store": case["store"].astype(jnp.bfloat16)}
    with pytest.raises(
        NotImplementedError, match=r"store is bfloat16.*int8 where rows have scales"
    ):
        zones_kernel.attend_zones(*zone_operands(halves), 0, scale=1.0)


@pytest.mark.parametrize(
    "platform, head_dim, dtype",
    [("cuda", 64, jnp.bfloat16), ("cuda", 96, jnp.float32), ("rocm", 128, jnp.bfloat16)],
)
@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
def test_attend_zones_lowers(platform, head_dim, dtype, host):
    def attend(a):
        if host:
            a = a | {"store": jax.device_put(a["store"], jax.memory.Space.Host)}
        return zones_kernel.attend_zones(*zone_operands(a), a["layer"], scale=0.1)

    operands = shapes(head_dim, dtype, group=7)
    for rows, scales in (("store", "store_scales"), ("cache_rows", "cache_scales")):
        shape = operands[rows].shape
        shape = (*shape[:3], 4 * shape[3], *shape[4:])  # past what `test_large_arrays` is about
        operands[rows] = jax.ShapeDtypeStruct(shape, jnp.int8)
        operands[scales] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    text = lower_for(platform, attend, operands)
    assert text.count('name = "attend_zones"') == 1
    # Levels are read as they lie, and nothing but the kernel touches what is large.
    for other in ("gather", "dynamic_slice", "stablehlo.convert"):
        assert other not in text


@pytest.mark.parametrize("kernel", [False, True], ids=["xla", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_appended_rows_are_rounded(kernel, dtype):
    rng = np.random.default_rng(7)
    store = ops.Rows(
        jnp.full((2, 2, 3, 40, 2, 64), 5, jnp.int8), jnp.full((2, 2, 3, 40, 2), 9, jnp.float32)
    )
    rows = jnp.asarray(rng.normal(size=(3, 17, 2, 64)), dtype)
    append = append_reference.append_rows
    if kernel:
        append = functools.partial(append_kernel.append_rows, interpret=True)
    found = jax.jit(append)(store, rows, jnp.int32(1), jnp.int32(0), jnp.int32(20))
    new = quantise(rows)
    for field in ("data", "scales"):
        expected = np.asarray(getattr(store, field)).copy()
        expected[1, 0, :, 20:37] = getattr(new, field)
        np.testing.assert_array_equal(getattr(found, field), expected)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_append_rows_lowers_into_host_memory(platform):
    shape = (32, 8, 8, 131072, 2, 128)
    host = jax.memory.Space.Host
    operands = (
        jax.ShapeDtypeStruct(shape, jnp.int8),
        jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        jax.ShapeDtypeStruct((8, 100_001, 2, 128), jnp.bfloat16),
    )

    def run(data, scales, rows):
        store = ops.Rows(jax.device_put(data, host), scales)
        written = append_kernel.append_rows(store, rows, 1, 2, 3)
        assert jax.typeof(written.data).memory_space == host
        assert jax.typeof(written.scales).memory_space == jax.memory.Space.Device
        return written

    text = lower_for(platform, run, *operands)
    assert 'name = "append_rows"' in text
    assert "-> tuple<" not in text


def test_picks_of_nothing_read_no_scale():
    """A step that retrieves nothing is as good with scales that are not finite."""
    case = scaled(zone_case(3, 2, 64))
    case |= {name: jnp.full_like(case[name], NO_ID) for name in ("tokens", "slots")}
    case |= {"hit": jnp.zeros_like(case["hit"]), "store_scales": case["store_scales"] * jnp.nan}
    assert np.isfinite(run_kernel(case, SPLIT).outputs).all()
