"""The Mosaic GPU kernel of `attend_dense`: interpreted, and lowered. `tests/gpu` runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_dense import mosaic_gpu
from pallas_kernels.rounding import quantise
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED
from tests.support.lowering import lower_for
from tests.support.mosaic_gpu_interpreter import interpret, needs_interpreter

LAYERS, HEADS, LAYER, SCALE = 2, 2, 1, 0.3
TOLERANCE = 1e-2  # weights are rounded to the values' dtype

# Group, head dim, dtype, room for tokens, config.
CASES = [
    (3, 64, "float16", 328, mosaic_gpu.Config(1, 64, 2)),
    (4, 128, "bfloat16", 648, mosaic_gpu.Config(3, 64, 3)),
    # More programs than blocks: some have nothing.
    (7, 64, "bfloat16", 264, mosaic_gpu.Config(20, 64, 1)),
    (1, 128, "bfloat16", 520, mosaic_gpu.Config(2, 128, 2)),
    (16, 256, "bfloat16", 200, None),
]


def make_case(group, head_dim, dtype, tokens, seed=0):
    """A ragged step; all that must not be read is NaN, other layers included."""
    rng = np.random.default_rng((seed, group, head_dim))
    lengths = 0, 1, tokens - 51, tokens + 7
    query = rng.normal(size=(len(lengths), HEADS, group, head_dim))
    keys, values = rng.normal(size=(2, LAYERS, len(lengths), HEADS, tokens, head_dim))
    for cache in (keys, values):
        cache[1 - LAYER] = np.nan
        for sequence, length in enumerate(lengths):
            cache[:, sequence, :, length:] = np.nan
    query, keys, values = (jnp.asarray(x, dtype) for x in (query, keys, values))
    lengths = jnp.asarray(lengths, jnp.int32)
    return query, ops.Rows(keys), ops.Rows(values), lengths, jnp.int32(LAYER)


def exact(query, keys, values, lengths, layer):
    """Output and logsumexp in float64."""
    query, keys, values = (
        np.asarray(x, np.float64) for x in (query, keys.data[layer], values.data[layer])
    )
    output, logsumexp = np.zeros(query.shape), np.full(query.shape[:-1], MASKED)
    for b, length in enumerate(np.asarray(lengths)):
        if length > 0:
            logits = SCALE * np.einsum("hgd,htd->hgt", query[b], keys[b, :, :length])
            mass = np.exp(logits)
            output[b] = np.einsum("hgt,htd->hgd", mass, values[b, :, :length])
            output[b] /= mass.sum(-1)[..., None]
            logsumexp[b] = np.log(mass.sum(-1))
    return output, logsumexp


def check(found, case):
    output, logsumexp = (np.asarray(x) for x in found)
    assert output.dtype == logsumexp.dtype == np.float32
    np.testing.assert_array_equal(output[0], 0)
    plain = ops.attend_dense(*case, scale=SCALE, implementation="xla")
    for expected in (plain, exact(*case)):
        error = np.linalg.norm(output - expected[0], axis=-1)
        assert (error <= TOLERANCE * np.linalg.norm(expected[0], axis=-1)).all()
        np.testing.assert_allclose(logsumexp, expected[1], rtol=1e-6, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("group, head_dim, dtype, tokens, config", CASES)
def test_it_is_the_reference(group, head_dim, dtype, tokens, config):
    case = make_case(group, head_dim, dtype, tokens)
    kernel = functools.partial(mosaic_gpu.attend_dense, scale=SCALE, config=config, interpret=True)
    check(interpret(kernel, *case), case)


@needs_interpreter
def test_it_may_be_mapped_over_more_sequences():
    shape, config = CASES[0][:4], CASES[0][4]
    cases = [make_case(*shape, seed=seed) for seed in (1, 2)]
    kernel = functools.partial(mosaic_gpu.attend_dense, scale=SCALE, config=config, interpret=True)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *cases)
    found = interpret(jax.vmap(kernel), *stacked)
    for number, case in enumerate(cases):
        check([x[number] for x in found], case)


def check_nan(run):
    """Check that NaN in a key and in a value that are seen show in their row alone."""
    query, keys, values, lengths, layer = make_case(2, 64, "bfloat16", 264)
    keys = keys._replace(data=keys.data.at[LAYER, 2, 0, 100, 7].set(jnp.nan))
    values = values._replace(data=values.data.at[LAYER, 3, 1, 200, 9].set(jnp.nan))
    output, logsumexp = (np.asarray(x) for x in run(query, keys, values, lengths, layer))
    spoilt = np.isnan(output)
    assert spoilt[2, 0].all()
    assert spoilt[3, 1, :, 9].all()
    assert spoilt.sum() == 2 * 64 + 2
    assert np.isnan(logsumexp[2, 0]).all()
    assert np.isnan(logsumexp).sum() == 2


@needs_interpreter
def test_nan_shows_in_its_row_alone():
    kernel = functools.partial(
        mosaic_gpu.attend_dense, scale=SCALE, interpret=True, config=mosaic_gpu.Config(2)
    )
    check_nan(lambda *case: interpret(kernel, *case))


@pytest.mark.parametrize("group, head_dim, dtype, tokens, config", CASES)
def test_it_lowers(group, head_dim, dtype, tokens, config):
    case = jax.eval_shape(lambda: make_case(group, head_dim, dtype, tokens))
    kernel = functools.partial(mosaic_gpu.attend_dense, scale=SCALE, config=config)
    text = lower_for("cuda", kernel, *case)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    # A slice of a layer would be a copy, as would be a transposition.
    assert "dynamic_slice" not in text
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("rows", [1, 8, 64, 2048])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_heuristic_fills_the_gpu_once(rows, head_dim):
    config = mosaic_gpu.heuristic(rows, 131072, head_dim)
    assert config.splits == 1 or rows * config.splits <= 3 * 132
    assert mosaic_gpu.heuristic(rows, 64, head_dim).splits == 1


@pytest.mark.parametrize(
    "change, match",
    [
        ({"head_dim": 32}, "head_dim is 32"),
        ({"head_dim": 96}, "head_dim is 96; the Mosaic GPU kernel wants a multiple of 64"),
        ({"group": 17}, "17 query heads"),
        ({"dtype": "float32"}, "wants one 16-bit dtype"),
        ({"tokens": 56}, "room for 56 tokens"),
        ({"tokens": 301}, "a multiple of 8"),
        ({"config": mosaic_gpu.Config(2, 128, 8)}, "bytes of shared memory"),
    ],
)
def test_it_says_what_it_does_not_support(change, match):
    given = {"group": 2, "head_dim": 64, "dtype": "bfloat16", "tokens": 128} | change
    config = given.pop("config", None)
    query = jnp.zeros((1, HEADS, given["group"], given["head_dim"]), given["dtype"])
    rows = ops.Rows(jnp.zeros((1, 1, HEADS, given["tokens"], given["head_dim"]), given["dtype"]))
    with pytest.raises(NotImplementedError, match=match):
        mosaic_gpu.attend_dense(query, rows, rows, jnp.ones(1), 0, scale=1.0, config=config)


def test_it_reads_no_scaled_rows(monkeypatch):
    query, keys, _, lengths, layer = make_case(2, 64, "bfloat16", 128)
    scaled = ops.Rows(*quantise(jnp.nan_to_num(keys.data)))
    with pytest.raises(NotImplementedError, match="scaled rows"):
        mosaic_gpu.attend_dense(query, scaled, scaled, lengths, layer, scale=1.0)
    monkeypatch.setattr(launch, "compute_capability", lambda: (8, 9))
    operands = query, keys, keys, lengths, layer
    with pytest.raises(NotImplementedError, match=r"capability 8\.9; .* wants Hopper"):
        ops.attend_dense(*operands, scale=1.0, implementation="mosaic_gpu")
