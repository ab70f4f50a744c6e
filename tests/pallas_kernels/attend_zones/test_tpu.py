"""The TPU's kernel of `attend_zones`, interpreted as on a TPU, and lowered for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attend_zones import reference, tpu
from pallas_kernels.types import MASKED, NO_ID
from tests.pallas_kernels.attend_zones.test_kernel import (
    BATCH,
    HEADS,
    LAYER,
    SINKS,
    TOLERANCES,
    assert_close,
    shapes,
    zone_case,
)
from tests.support.lowering import lower_for
from tests.support.tpu_interpreter import interpret
from tests.support.zone_operands import zone_operands

SCALE = 0.2
# More than one tile in each zone; the counts do not divide.
TILES = tpu.Config(steady_tile=32, retrieved_tile=16, cluster_block=32)


def rows_in_store(case):
    """The step without a row cache: what must not be read of the store is NaN. One row is left out.

    A row in the midst of a list is none, too.
    """
    rng = np.random.default_rng(1)
    tokens = np.asarray(case["tokens"]).copy()
    tokens[0, 0, 3] = NO_ID
    store = np.full(case["store"].shape, np.nan)
    for row in np.ndindex(BATCH, HEADS):
        read = tokens[row][tokens[row] != NO_ID]
        store[(LAYER, *row, read)] = rng.normal(size=(len(read), *store.shape[-2:]))
    return case | {
        "store": jnp.asarray(store, case["store"].dtype),
        "tokens": jnp.asarray(tokens),
        "cache_rows": case["cache_rows"][:, :, :, :0],
        "slots": jnp.full_like(case["slots"], NO_ID),
        "hit": jnp.zeros_like(case["hit"]),
    }


def in_float64(case):
    """Each zone's outputs and logsumexps, head by head."""
    case = {
        name: np.asarray(x, np.int64 if x.dtype == jnp.int32 else np.float64)
        for name, x in case.items()
    }
    group, head_dim = case["query"].shape[2:]
    outputs = np.zeros((3, BATCH, HEADS, group, head_dim))
    logsumexps = np.full(outputs.shape[:-1], MASKED)
    for b, h, g in np.ndindex(BATCH, HEADS, group):
        at = (LAYER, b, h)
        query, tokens = case["query"][b, h, g], case["tokens"][b, h]
        sink = case["sink"][at][: case["sink_tokens"][b]]
        window = case["window"][at][: case["window_tokens"][b]]
        sizes = np.diff(case["offsets"][at])
        counts = np.minimum(sizes, case["remaining"][b, h])
        some = counts > 0
        read = np.concatenate([sink, window]), case["store"][at][tokens[tokens != NO_ID]]
        zones = [(SCALE * rows[:, 0] @ query, rows[:, 1]) for rows in read]
        logits = case["logits"][b, h, g][some] + np.log(counts[some])
        zones.append((logits, case["value_means"][at][some]))
        for zone, (logits, values) in enumerate(zones):
            if len(logits):
                masses = np.exp(logits)
                outputs[zone, b, h, g] = masses @ values / masses.sum()
                logsumexps[zone, b, h, g] = np.log(masses.sum())
    return outputs, logsumexps


@pytest.mark.parametrize(
    "group, head_dim, dtype, sinks, config",
    [
        (3, 64, "float32", SINKS, TILES),
        pytest.param(7, 128, "bfloat16", 0, TILES, marks=pytest.mark.slow),
        (1, 256, "float32", SINKS, None),
    ],
)
def test_it_is_the_reference(group, head_dim, dtype, sinks, config):
    case = rows_in_store(zone_case(group, group, head_dim, dtype, sinks))
    operands = zone_operands(case), jnp.int32(LAYER)

    def kernel(operands, layer):
        return tpu.attend_zones(*operands, layer, scale=SCALE, config=config, interpret=True)

    found = interpret(kernel, *operands)
    expected = reference.attend_zones(*operands[0], LAYER, scale=SCALE)
    # The last sequence retrieves nothing; without sinks it has nothing at all.
    assert (np.asarray(found.logsumexps)[1:, -1] == np.float32(MASKED)).all()
    assert (np.asarray(found.logsumexps)[0, -1] <= MASKED / 2).all() == (sinks == 0)
    assert np.isfinite(found.outputs).all()
    exact = in_float64(case)
    for zone in range(tpu.PARTS):
        of_zone = found.outputs[zone], found.logsumexps[zone]
        by_reference = expected.outputs[zone], expected.logsumexps[zone]
        assert_close(of_zone, by_reference, TOLERANCES[dtype])
        assert_close(of_zone, (exact[0][zone], exact[1][zone]), TOLERANCES[dtype])
    assert found.cache_rows.shape == case["cache_rows"].shape


def test_nan_in_a_row_shows_in_its_zone_alone():
    """Not in the next kv head's, whose rows lie in the same memory after it."""
    case = rows_in_store(zone_case(0, 2, 64))
    case["store"] = case["store"].at[LAYER, 0, 0, case["tokens"][0, 0, 0], 1, 5].set(jnp.nan)

    def kernel(*operands):
        return tpu.attend_zones(*operands, LAYER, scale=SCALE, config=TILES, interpret=True)

    spoilt = np.isnan(np.asarray(interpret(kernel, *zone_operands(case)).outputs))
    assert spoilt[1, 0, 0].any(axis=-1).all()
    assert spoilt.any(axis=-1).sum() == 2


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c | {"query": jnp.zeros((BATCH, HEADS, 4, 32))}, "head_dim is 32"),
        (lambda c: c | {"query": c["query"].astype(jnp.float16)}, "float16; the TPU's kernel"),
        (lambda c: c | {"window": c["window"].astype(jnp.bfloat16)}, "window is bfloat16"),
        (lambda c: c | {"tokens": c["tokens"][..., :0]}, "tokens is empty"),
        (lambda c: c | {"cache_rows": c["store"]}, "a row cache, or a store in host memory"),
        (
            lambda c: c | {"store": jax.device_put(c["store"], jax.memory.Space.Host)},
            "a row cache, or a store in host memory",
        ),
    ],
)
def test_it_says_what_it_does_not_support(change, match):
    case = change(rows_in_store(zone_case(0)))
    with pytest.raises(NotImplementedError, match=match):
        tpu.attend_zones(*zone_operands(case), 0, scale=1.0)


@pytest.mark.parametrize("group, head_dim, dtype", [(3, 64, "bfloat16"), (16, 256, "float32")])
def test_it_lowers(group, head_dim, dtype):
    operands = shapes(head_dim, dtype, group)
    cache = operands["cache_rows"]
    operands["cache_rows"] = jax.ShapeDtypeStruct((*cache.shape[:3], 0, 2, head_dim), cache.dtype)
    layer = operands.pop("layer")
    kernel = functools.partial(tpu.attend_zones, scale=SCALE)
    text = lower_for("tpu", kernel, *zone_operands(operands), layer)
    assert 'kernel_name = "attend_zones"' in text
    # Nothing but the kernel touches what is large.
    assert "gather" not in text
