"""`attend_dense`: its meaning against float64, its kernel interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_dense import triton as kernel
from pallas_kernels.types import MASKED
from tests.support.lowering import lower_for

LAYERS, BATCH, HEADS, TOKENS, LAYER = 2, 5, 2, 150, 1
# Nothing, one token, some, all of them, and more than there are.
LENGTHS = (0, 1, 97, TOKENS, TOKENS + 7)
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

# Nearly all of the time would go to making fast code that runs once.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}


def make_case(group, head_dim, dtype, seed=0):
    """A ragged step; all that must not be read is NaN, other layers included."""
    rng = np.random.default_rng((seed, group, head_dim))
    query = rng.normal(size=(BATCH, HEADS, group, head_dim))
    keys, values = rng.normal(size=(2, LAYERS, BATCH, HEADS, TOKENS, head_dim))
    for cache in (keys, values):
        cache[1 - LAYER] = np.nan
        for sequence, length in enumerate(LENGTHS):
            cache[:, sequence, :, max(length, 0) :] = np.nan
    query, keys, values = (jnp.asarray(x, dtype) for x in (query, keys, values))
    return query, ops.Rows(keys), ops.Rows(values), jnp.asarray(LENGTHS, jnp.int32)


def numbers(rows):
    """The numbers that rows stand for, in float64."""
    data = np.asarray(rows.data, np.float64)
    return data if rows.scales is None else data * np.asarray(rows.scales, np.float64)[..., None]


def exact(query, keys, values, lengths, scale):
    """Output and logsumexp in float64."""
    query, keys, values = np.asarray(query, np.float64), numbers(keys), numbers(values)
    output, logsumexp = np.zeros(query.shape), np.full(query.shape[:-1], MASKED)
    for b, length in enumerate(np.asarray(lengths)):
        if length > 0:
            k, v = keys[LAYER, b, :, :length], values[LAYER, b, :, :length]
            logits = scale * np.einsum("hgd,htd->hgt", query[b], k)
            peak = logits.max(-1)
            mass = np.exp(logits - peak[..., None])
            output[b] = np.einsum("hgt,htd->hgd", mass, v) / mass.sum(-1)[..., None]
            logsumexp[b] = peak + np.log(mass.sum(-1))
    return output, logsumexp


def check(found, expected, tolerance):
    output, logsumexp = (np.asarray(x) for x in found)
    assert output.dtype == logsumexp.dtype == np.float32
    np.testing.assert_array_equal(output[0], 0)
    error = np.linalg.norm(output - expected[0], axis=-1)
    assert (error <= tolerance * np.linalg.norm(expected[0], axis=-1)).all()
    np.testing.assert_allclose(logsumexp, expected[1], rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("group, head_dim, dtype", [(1, 48, "float32"), (7, 64, "bfloat16")])
def test_the_reference_is_softmax_attention(group, head_dim, dtype):
    case = make_case(group, head_dim, dtype)
    attend = functools.partial(ops.attend_dense, scale=0.3, implementation="xla")
    found = jax.jit(attend)(*case, jnp.int32(LAYER))
    check(found, exact(*case, 0.3), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "group, head_dim, config",
    [
        (7, 128, kernel.Config(3, 16)),
        (4, 64, kernel.Config(1, 32)),
        # More programs than blocks: some have nothing.
        (1, 96, kernel.Config(20, 16)),
        # The one that it picks by itself.
        (16, 256, None),
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


@pytest.mark.parametrize("rows", [1, 8, 64, 2048])
@pytest.mark.parametrize("head_dim, itemsize", [(64, 2), (96, 2), (128, 4), (256, 4)])
def test_heuristic_fills_the_gpu_and_fits_its_shared_memory(rows, head_dim, itemsize):
    tokens = 131072
    config = kernel.heuristic(rows, tokens, head_dim, itemsize)
    assert rows * config.splits >= 4 * 132 or config.splits == tokens // (4 * config.block)
    assert config.splits == 1 or rows * config.splits <= 5 * 132
    width = 128 if head_dim == 96 else head_dim
    assert 2 * config.num_stages * config.block * width * itemsize <= 100_000
    # A context of a few tokens is not cut to crumbs.
    assert kernel.heuristic(rows, 40, head_dim, itemsize).splits == 1


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q, k, v: (q[..., :32], k, v), "head_dim is 32"),
        (lambda q, k, v: (jnp.tile(q, (1, 1, 17, 1)), k, v), "17 query heads"),
        (lambda q, k, v: (q, k, ops.Rows(v.data.astype(jnp.bfloat16))), "values bfloat16"),
    ],
)
def test_the_kernel_says_what_it_does_not_support(change, match):
    *arrays, lengths = make_case(1, 64, "float32")
    with pytest.raises(NotImplementedError, match=match):
        kernel.attend_dense(*change(*arrays), lengths, 0, scale=1.0)


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
def test_the_kernel_lowers(platform, head_dim, dtype):
    cache = ops.Rows(jax.ShapeDtypeStruct((2, 8, 8, 131072, head_dim), dtype))
    query = jax.ShapeDtypeStruct((8, 8, 7, head_dim), dtype)
    lengths, layer = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), ()))
    attend = functools.partial(kernel.attend_dense, scale=0.1)
    text = lower_for(platform, attend, query, cache, cache, lengths, layer)
    assert "attend_dense" in text
    assert "merge_states" in text
    # Nothing but the kernel touches what is large.
    assert "gather" not in text
    assert "dynamic_slice" not in text
