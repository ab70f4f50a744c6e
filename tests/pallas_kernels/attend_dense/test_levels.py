"""`attend_dense` of keys and values in int8: against float64, and against their numbers in float32.

The kernel is interpreted and lowered.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_dense import triton as kernel
from pallas_kernels.rounding import dequantise
from tests.pallas_kernels.attend_dense.test_attend_dense import (
    BATCH,
    HEADS,
    LAYER,
    LAYERS,
    LENGTHS,
    QUICKLY,
    TOKENS,
    TOLERANCES,
    check,
    exact,
)
from tests.support.lowering import lower_for


def make_case(group, head_dim, dtype, seed=0):
    """A ragged step; where nothing must be read, levels are at their ends and scales are NaN."""
    rng = np.random.default_rng((seed, group, head_dim))
    cache = (LAYERS, BATCH, HEADS, TOKENS, head_dim)
    rows = []
    for _ in range(2):
        levels = rng.integers(-127, 128, cache, np.int8)
        # Of numbers of very different sizes: a scale that goes to another token shows.
        scales = (2.0 ** rng.uniform(-9, -5, cache[:-1])).astype(np.float32)
        unread = np.arange(TOKENS) >= np.asarray(LENGTHS)[:, None]
        for array, poison in ((levels, 127), (scales, np.nan)):
            array[1 - LAYER] = poison
            array[:, unread[:, None].repeat(HEADS, 1)] = poison
        rows.append(ops.Rows(jnp.asarray(levels), jnp.asarray(scales)))
    query = jnp.asarray(rng.normal(size=(BATCH, HEADS, group, head_dim)), dtype)
    return query, *rows, jnp.asarray(LENGTHS, jnp.int32)


@pytest.mark.parametrize(
    "group, head_dim, dtype",
    [(1, 64, "float32"), (3, 80, "float32"), (7, 128, "bfloat16"), (3, 64, "float16")],
)
def test_the_reference_is_softmax_attention_over_the_numbers(group, head_dim, dtype):
    case = make_case(group, head_dim, dtype)
    attend = jax.jit(functools.partial(ops.attend_dense, scale=0.3, implementation="xla"))
    found = attend(*case, jnp.int32(LAYER))
    # Levels are no source of error: the query's numbers are those of the case, in any dtype.
    check(found, exact(*case, 0.3), TOLERANCES["float32"])
    query, keys, values, lengths = case
    floats = (ops.Rows(dequantise(rows)) for rows in (keys, values))
    expected = attend(query, *floats, lengths, jnp.int32(LAYER))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "group, head_dim, config",
    [
        (7, 128, kernel.Config(3, 16)),
        (3, 64, kernel.Config(1, 32)),
        # More programs than blocks: some have nothing.
        (1, 96, kernel.Config(20, 16)),
        # The one that it picks by itself.
        (5, 256, None),
    ],
)
def test_the_kernel_is_the_reference(group, head_dim, config, dtype):
    case = make_case(group, head_dim, dtype)
    attend = functools.partial(kernel.attend_dense, scale=0.3, config=config, interpret=True)
    found = jax.jit(attend, **QUICKLY)(*case, jnp.int32(LAYER))
    reference = functools.partial(ops.attend_dense, scale=0.3, implementation="xla")
    expected = jax.jit(reference, **QUICKLY)(*case, jnp.int32(LAYER))
    check(found, expected, TOLERANCES[dtype])
    check(found, exact(*case, 0.3), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_that_is_not_finite_shows_in_its_sequence_alone(dtype):
    """As a key, or a value, that was not finite is rounded: levels of zero, and such a scale."""
    query, keys, values, lengths = make_case(3, 64, dtype)
    attend = functools.partial(kernel.attend_dense, scale=0.3, interpret=True)
    b, head, token = LENGTHS.index(TOKENS), 1, 20
    for name in ("keys", "values"):
        for bad in (np.nan, np.inf):
            rows = {"keys": keys, "values": values}
            at = (LAYER, b, head, token)
            levels, scales = rows[name]
            rows[name] = ops.Rows(levels.at[at].set(0), scales.at[at].set(bad))
            given = (query, rows["keys"], rows["values"], lengths, jnp.int32(LAYER))
            plain = functools.partial(ops.attend_dense, scale=0.3, implementation="xla")
            for function in (attend, plain):
                output, _ = jax.jit(function, **QUICKLY)(*given)
                spoilt = np.isnan(np.asarray(output)).all(axis=(2, 3))
                expected = np.zeros(spoilt.shape, bool)
                expected[b, head] = True
                np.testing.assert_array_equal(spoilt, expected)
                assert np.isfinite(np.asarray(output)[~expected]).all()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q, k, v: (q.astype(jnp.float16), k, v), "query is float16, which does not hold"),
        (lambda q, k, v: (q, k, ops.Rows(v.data)), "int8 where keys and values have scales"),
        (lambda q, k, v: (q, ops.Rows(k.data), ops.Rows(v.data)), "keys are int8"),
        (lambda q, k, v: (q, k, ops.Rows(v.data.astype(q.dtype), v.scales)), "values float32"),
    ],
)
def test_the_kernel_says_what_it_does_not_support(change, match):
    *arrays, lengths = make_case(1, 64, "float32")
    with pytest.raises(NotImplementedError, match=match):
        kernel.attend_dense(*change(*arrays), lengths, 0, scale=1.0)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("head_dim, dtype", [(64, jnp.bfloat16), (96, jnp.float32)])
def test_the_kernel_lowers(platform, head_dim, dtype):
    cache = (2, 8, 8, 131072, head_dim)
    rows = ops.Rows(
        jax.ShapeDtypeStruct(cache, jnp.int8), jax.ShapeDtypeStruct(cache[:-1], jnp.float32)
    )
    query = jax.ShapeDtypeStruct((8, 8, 7, head_dim), dtype)
    lengths, layer = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), ()))
    attend = functools.partial(kernel.attend_dense, scale=0.1)
    text = lower_for(platform, attend, query, rows, rows, lengths, layer)
    assert "attend_dense" in text
    assert "merge_states" in text
    # Nothing but the kernel touches what is large: no float copy of the levels is made.
    assert "gather" not in text
    assert "dynamic_slice" not in text
    assert "stablehlo.convert" not in text
