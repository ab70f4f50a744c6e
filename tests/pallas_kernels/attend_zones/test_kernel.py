"""The kernels of `attend_zones` and `merge_states`, interpreted, against the references."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attend_zones import reference
from pallas_kernels.attend_zones import triton as kernel
from pallas_kernels.merge_states import reference as merge_reference
from pallas_kernels.merge_states import triton as merge_kernel
from pallas_kernels.types import MASKED, NO_ID
from tests.support.lowering import lower_for
from tests.support.zone_operands import zone_operands

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
LAYERS, BATCH, HEADS, LAYER = 2, 3, 2, 1
SINKS, WINDOW, TOKENS, SLOTS, ROOM, CLUSTERS = 4, 75, 150, 100, 71, 70

# More than one tile and more than one program in each zone; the counts do not divide.
TILES = {"missed_tile": 16, "hit_tile": 16, "cluster_tile": 16, "steady_tile": 16}
SPLIT = kernel.Config(2, 3, 2, 2, **TILES)
# Retrieved rows, rows in the window, clusters in use: of each sequence.
COUNTS = [(ROOM, 75, 70), (40, 33, 17), (0, 0, 0)]


def zone_case(seed, group=4, head_dim=64, dtype="float32", sinks=SINKS):
    """A step whose last sequence has sinks only; all that must not be read is NaN."""
    rng = np.random.default_rng(seed)
    row = (LAYERS, BATCH, HEADS)

    def normal(*shape):
        return rng.normal(size=shape)

    case = {
        "query": normal(BATCH, HEADS, group, head_dim),
        "sink": normal(*row, sinks, 2, head_dim),
        "sink_tokens": np.minimum([4, 3, 2], sinks),
        "window": np.full((*row, WINDOW, 2, head_dim), np.nan),
        "window_tokens": np.array([count for _, count, _ in COUNTS]),
        "store": np.full((*row, TOKENS, 2, head_dim), np.nan),
        "cache_rows": np.full((*row, SLOTS, 2, head_dim), np.nan),
        "tokens": np.full((BATCH, HEADS, ROOM), NO_ID),
        "slots": np.full((BATCH, HEADS, ROOM), NO_ID),
        "hit": np.zeros((BATCH, HEADS, ROOM), bool),
        "logits": np.full((BATCH, HEADS, group, CLUSTERS), MASKED),
        "value_means": np.full((*row, CLUSTERS, head_dim), np.nan),
        "offsets": np.zeros((*row, CLUSTERS + 1), int),
        "remaining": np.zeros((BATCH, HEADS, CLUSTERS), int),
    }
    for b, (retrieved, window, clusters) in enumerate(COUNTS):
        case["sink"][:, b, :, case["sink_tokens"][b] :] = np.nan
        case["window"][LAYER, b, :, :window] = normal(HEADS, window, 2, head_dim)
        for h in range(HEADS):
            at = (LAYER, b, h)
            case["store"][at][0] = 0  # the reference reads it in place of rows that hit
            tokens = rng.permutation(TOKENS)[:retrieved]
            slots = rng.permutation(SLOTS)[:retrieved]
            kind = rng.integers(0, 3, retrieved)  # a hit, a miss, a miss without a slot
            case["tokens"][b, h, :retrieved] = tokens
            case["slots"][b, h, :retrieved] = np.where(kind == 2, NO_ID, slots)
            case["hit"][b, h, :retrieved] = kind == 0
            case["store"][at][tokens[kind > 0]] = normal((kind > 0).sum(), 2, head_dim)
            case["cache_rows"][at][slots[kind == 0]] = normal((kind == 0).sum(), 2, head_dim)

            sizes = rng.integers(1, 9, clusters)
            case["offsets"][at][1 : clusters + 1] = sizes.cumsum()
            case["offsets"][at][clusters + 1 :] = sizes.sum()
            # Of some clusters more is said to remain than they have.
            remaining = rng.integers(0, sizes + 3)
            case["remaining"][b, h, :clusters] = remaining
            case["logits"][b, h, :, :clusters] = 3 * normal(group, clusters)
            # Past the last cluster that counts, anything may be stored.
            end = np.flatnonzero(remaining).max(initial=-1) + 1
            case["value_means"][at][:end] = normal(end, head_dim)
    floats = ("query", "sink", "window", "store", "cache_rows", "value_means")
    dtypes = {name: jnp.dtype(dtype) for name in floats} | {"hit": bool, "logits": jnp.float32}
    return {name: jnp.asarray(x, dtypes.get(name, jnp.int32)) for name, x in case.items()}


def without_cache(case):
    """The same step without slots: all rows, which are numbers now, are in the store."""
    rng = np.random.default_rng(1)
    store = jnp.asarray(rng.normal(size=case["store"].shape), case["store"].dtype)
    return case | {
        "store": store,
        "cache_rows": case["cache_rows"][:, :, :, :0],
        "slots": jnp.full_like(case["slots"], NO_ID),
        "hit": jnp.zeros_like(case["hit"]),
    }


# Nearly all of the time would go to making fast code that runs once.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}


@functools.partial(jax.jit, static_argnames="config", **QUICKLY)
def run_kernel(case, config=SPLIT):
    operands = zone_operands(case)
    return kernel.attend_zones(*operands, LAYER, scale=0.2, config=config, interpret=True)


@functools.partial(jax.jit, **QUICKLY)
def run_reference(case):
    return reference.attend_zones(*zone_operands(case), jnp.int32(LAYER), scale=0.2)


def assert_close(found, expected, tolerance):
    """Compares two states `(outputs, logsumexps)`, outputs by the norm of their difference."""
    present = np.asarray(expected[1]) > MASKED / 2
    np.testing.assert_array_equal(np.asarray(found[1]) > MASKED / 2, present)
    output, expected_output = (np.asarray(x[0], np.float64)[present] for x in (found, expected))
    error = np.linalg.norm(output - expected_output, axis=-1)
    assert (error <= tolerance * np.linalg.norm(expected_output, axis=-1)).all()
    logsumexp, expected_lse = (np.asarray(x[1])[present] for x in (found, expected))
    np.testing.assert_allclose(logsumexp, expected_lse, atol=tolerance)


def merge(outputs, logsumexps):
    """`merge_states` in float64; not by JAX, which would compile every operation by itself."""
    outputs, logsumexps = np.asarray(outputs, np.float64), np.asarray(logsumexps, np.float64)
    peak = logsumexps.max(axis=0)
    masses = np.where(logsumexps > MASKED / 2, np.exp(logsumexps - peak), 0)
    total = np.maximum(masses.sum(axis=0), 1e-300)
    weighted = (masses / total)[..., None] * np.where(masses[..., None] > 0, outputs, 0)
    return weighted.sum(axis=0), np.maximum(peak + np.log(total), MASKED)


def check_zones(found, expected, config, tolerance):
    """Compares each zone alone, then all, then the cache."""
    outputs, logsumexps = (np.asarray(x) for x in found[:2])
    expected_outputs, expected_lse = (np.asarray(x) for x in expected[:2])
    missed, hits, estimated, steady = config.splits
    zones = {0: steady, 2: estimated, 1: missed + hits}
    end = sum(config.splits)
    assert len(outputs) == end
    for zone, splits in zones.items():
        parts, end = slice(end - splits, end), end - splits
        merged = merge(outputs[parts], logsumexps[parts])
        assert_close(merged, (expected_outputs[zone], expected_lse[zone]), tolerance)
    assert np.isfinite(logsumexps).all()
    assert_close(merge(outputs, logsumexps), merge(expected_outputs, expected_lse), tolerance)
    # Bit by bit, NaN included: rows admitted to their slots, and no other row touched.
    cache, expected_cache = (np.asarray(x.cache_rows.data, np.float32) for x in (found, expected))
    np.testing.assert_array_equal(cache, expected_cache)


@pytest.mark.parametrize(
    "group, head_dim, dtype, sinks, config",
    [
        (3, 96, "float32", SINKS, SPLIT),
        (7, 128, "bfloat16", SINKS, SPLIT),
        # More programs than tiles: some have nothing.
        (16, 64, "bfloat16", 0, kernel.Config(9, 1, 7, 8, **TILES)),
        # The one that it picks by itself.
        (1, 256, "float16", SINKS, None),
    ],
)
def test_attend_zones(group, head_dim, dtype, sinks, config):
    case = zone_case(group, group, head_dim, dtype, sinks)
    found, expected = run_kernel(case, config), run_reference(case)
    assert not np.array_equal(case["cache_rows"], expected.cache_rows.data, equal_nan=True)
    if config is None:
        itemsize = case["query"].dtype.itemsize
        config = kernel.heuristic(BATCH * HEADS, head_dim, itemsize, ROOM, CLUSTERS, WINDOW)
    # Without sinks the last sequence has nothing at all.
    assert (np.asarray(found.logsumexps)[:, -1] <= MASKED / 2).all() == (sinks == 0)
    check_zones(found, expected, config, TOLERANCES[dtype])


@pytest.mark.parametrize("group, head_dim, dtype", [(7, 128, "bfloat16"), (2, 96, "float32")])
def test_without_a_row_cache_all_rows_are_read_from_the_store(group, head_dim, dtype):
    case = without_cache(zone_case(group, group, head_dim, dtype))
    found, expected = run_kernel(case), run_reference(case)
    check_zones(found, expected, dataclasses.replace(SPLIT, missed_splits=0), TOLERANCES[dtype])
    assert found.cache_rows.shape == case["cache_rows"].shape


@pytest.mark.parametrize("rows", [1, 8, 64, 2048])
def test_heuristic_fills_the_gpu(rows):
    config = kernel.heuristic(rows, 128, 2, 1182, 6144, 1088)
    splits = sum(config.splits)
    # A few programs a processor, if there are tiles enough.
    assert rows * splits >= 3 * 132 or splits >= 50
    assert splits <= 8 or rows * splits <= 11 * 132


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c | {"query": jnp.zeros((BATCH, HEADS, 4, 32))}, "head_dim is 32"),
        (lambda c: c | {"query": jnp.zeros((BATCH, HEADS, 17, 64))}, "17 query heads"),
        (lambda c: c | {"store": c["store"].astype(jnp.bfloat16)}, "store is bfloat16"),
        (lambda c: c | {"tokens": c["tokens"][..., :0]}, "tokens is empty"),
        (
            lambda c: (
                without_cache(c) | {"store": jax.device_put(c["store"], jax.memory.Space.Host)}
            ),
            "without a row cache",
        ),
    ],
)
def test_attend_zones_says_what_it_does_not_support(change, match):
    with pytest.raises(NotImplementedError, match=match):
        kernel.attend_zones(*zone_operands(change(zone_case(0))), 0, scale=1.0)


@pytest.mark.parametrize("parts, head_dim", [(1, 128), (5, 96), (70, 128)])
def test_merge_states(parts, head_dim):
    rng = np.random.default_rng(parts)
    outputs = rng.normal(size=(parts, 2, 3, 7, head_dim))
    logsumexps = 3 * rng.normal(size=(parts, 2, 3, 7))
    empty = rng.random(logsumexps.shape) < 0.3
    empty[:, 0, 0, :2] = True  # nothing at all
    outputs[empty], logsumexps[empty] = np.nan, MASKED
    args = jnp.asarray(outputs, jnp.float32), jnp.asarray(logsumexps, jnp.float32)
    merge = functools.partial(merge_kernel.merge_states, interpret=True)
    found = jax.jit(merge, **QUICKLY)(*args)
    np.testing.assert_array_equal(found[0][0, 0, :2], 0)
    # The parts are summed one after the other here, in float32.
    assert_close(found, merge_reference.merge_states(*args), 3e-6)
    rounded = jax.jit(functools.partial(merge, dtype=jnp.bfloat16), **QUICKLY)(*args)
    np.testing.assert_array_equal(rounded[0], found[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded[1], found[1])


def shapes(head_dim, dtype, group=4):
    """A large step's operands, without their values."""
    batch, heads, retrieved, clusters = 8, 8, 1182, 6144
    row = (2, batch, heads)
    sizes = {
        "query": ((batch, heads, group, head_dim), dtype),
        "sink": ((*row, 4, 2, head_dim), dtype),
        "sink_tokens": ((batch,), jnp.int32),
        "window": ((*row, 1088, 2, head_dim), dtype),
        "window_tokens": ((batch,), jnp.int32),
        "store": ((*row, 131072, 2, head_dim), dtype),
        "cache_rows": ((*row, 6554, 2, head_dim), dtype),
        "tokens": ((batch, heads, retrieved), jnp.int32),
        "slots": ((batch, heads, retrieved), jnp.int32),
        "hit": ((batch, heads, retrieved), bool),
        "logits": ((batch, heads, group, clusters), jnp.float32),
        "value_means": ((*row, clusters, head_dim), dtype),
        "offsets": ((*row, clusters + 1), jnp.int32),
        "remaining": ((batch, heads, clusters), jnp.int32),
        "layer": ((), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    "platform, head_dim, dtype",
    [
        ("cuda", 64, jnp.bfloat16),
        ("cuda", 96, jnp.float32),
        ("cuda", 128, jnp.float16),
        ("cuda", 256, jnp.bfloat16),
        ("rocm", 128, jnp.bfloat16),
        ("rocm", 64, jnp.float32),
    ],
)
def test_attend_zones_lowers(platform, head_dim, dtype):
    def attend(a):
        return kernel.attend_zones(*zone_operands(a), a["layer"], scale=0.1)

    operands = shapes(head_dim, dtype, group=7)
    cache = operands["cache_rows"]
    no_slots = jax.ShapeDtypeStruct((*cache.shape[:3], 0, *cache.shape[4:]), cache.dtype)
    for each in (operands, operands | {"cache_rows": no_slots}):
        text = lower_for(platform, attend, each)
        assert text.count("attend_zones") > 0
        # Nothing but the kernel touches what is large.
        assert "gather" not in text
        assert "dynamic_slice" not in text


@pytest.mark.parametrize("platform, head_dim", [("cuda", 96), ("cuda", 256), ("rocm", 128)])
def test_merge_states_lowers(platform, head_dim):
    state = jax.ShapeDtypeStruct((81, 2, 8, 7, head_dim), jnp.float32)
    logsumexps = jax.ShapeDtypeStruct(state.shape[:-1], jnp.float32)
    assert "merge_states" in lower_for(platform, merge_kernel.merge_states, state, logsumexps)
