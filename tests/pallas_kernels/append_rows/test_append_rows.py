"""The kernel of `append_rows`: against the reference, interpreted; lowered; where it is picked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import dispatch
from pallas_kernels.append_rows import reference
from pallas_kernels.append_rows import triton as kernel
from tests.support.lowering import lower_for

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
LAYERS, BATCH, HEADS, TOKENS = 2, 3, 3, 80


def case(seed, head_dim, dtype, rows_dtype, new):
    """A store full of NaN and rows to append to it."""
    rng = np.random.default_rng(seed)
    store = jnp.full((LAYERS, BATCH, HEADS, TOKENS, 2, head_dim), jnp.nan, dtype)
    return ops.Rows(store), jnp.asarray(rng.normal(size=(HEADS, new, 2, head_dim)), rows_dtype)


@pytest.mark.parametrize(
    "head_dim, dtype, rows_dtype, new, config",
    [
        (64, "float32", "float32", 5, None),
        (96, "bfloat16", "float32", 37, None),
        (128, "float16", "bfloat16", 33, None),
        (256, "bfloat16", "bfloat16", 80, None),
        # Several programs a head, whose last one has less; a tile that does not divide a run.
        (96, "float32", "float16", 71, kernel.Config(7, 512)),
        (64, "bfloat16", "bfloat16", 1, kernel.Config(8, 128)),
    ],
)
def test_rows_are_written_and_nothing_else(head_dim, dtype, rows_dtype, new, config):
    store, rows = case(new, head_dim, dtype, rows_dtype, new)
    append = jax.jit(functools.partial(kernel.append_rows, config=config, interpret=True))
    for layer, sequence, start in {(1, 2, 0), (0, 1, min(3, TOKENS - new)), (1, 0, TOKENS - new)}:
        at = (jnp.int32(layer), jnp.int32(sequence), jnp.int32(start))
        found, expected = append(store, rows, *at), reference.append_rows(store, rows, *at)
        assert found.dtype == store.dtype
        found, expected = (np.asarray(x.data, np.float32) for x in (found, expected))
        np.testing.assert_array_equal(found, expected)


def test_what_passes_the_end_is_not_written():
    store, rows = case(0, 64, "float32", "float32", 9)
    found = jax.jit(functools.partial(kernel.append_rows, interpret=True))(store, rows, 0, 1, 75)
    expected = np.asarray(store.data).copy()
    expected[0, 1, :, 75:] = rows[:, :5]
    np.testing.assert_array_equal(found.data, expected)


def test_the_result_is_where_the_store_is():
    store, rows = case(0, 64, "float32", "float32", 9)
    append = functools.partial(kernel.append_rows, interpret=True)
    for space in (HOST, DEVICE):

        def run(store, rows, space=space):
            written = append(jax.device_put(store, space), rows, 0, 1, 2)
            assert jax.typeof(written.data).memory_space == space
            return written

        jax.jit(run)(store, rows)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("space", [HOST, DEVICE], ids=["host", "device"])
@pytest.mark.parametrize(
    "head_dim, dtype", [(64, "float32"), (96, "bfloat16"), (128, "float16"), (256, "bfloat16")]
)
def test_lowers(platform, space, head_dim, dtype):
    """For stores of more than 4 GB, whose offsets have 64 bits."""
    store = jax.ShapeDtypeStruct((32, 8, 8, 131072, 2, head_dim), dtype)
    rows = jax.ShapeDtypeStruct((8, 100_001, 2, head_dim), "bfloat16")
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def run(store, rows, *at):
        written = kernel.append_rows(ops.Rows(jax.device_put(store, space)), rows, *at)
        assert jax.typeof(written.data).memory_space == space
        return written

    text = lower_for(platform, run, store, rows, *[number] * 3)
    assert 'name = "append_rows"' in text
    assert "output_operand_alias" in text
    # One result: from a tuple XLA would not know that it is in host memory.
    assert "-> tuple<" not in text
    for other in ("slice", "gather", "scatter", "reshape", "copy"):
        assert f"stablehlo.{other}" not in text


@pytest.mark.parametrize("store, expected", [("host", {"triton"}), ("device", {"xla"})])
def test_the_kernel_is_for_host_memory(store, expected, monkeypatch):
    picked = []

    def pick(op, implementation, implementations, *args):
        assert implementation is None
        picked.append("triton" if "triton" in implementations else "xla")
        return implementations["xla"](*args)

    monkeypatch.setattr(dispatch, "call", pick)
    full, rows = case(0, 64, "float32", "float32", 9)
    full = jax.device_put(full, HOST if store == "host" else DEVICE)
    jax.jit(ops.append_rows)(full, rows, 0, 0, 0)
    assert set(picked) == expected


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_heuristic(head_dim, itemsize):
    """Whole tiles; long runs of a prompt's rows; programs enough for the rows of a growth."""
    row = 2 * head_dim * itemsize
    for new, least in ((131_072, kernel.PROGRAMS), (1024, 32), (1, 1)):
        config = kernel.heuristic(8, new, head_dim, itemsize)
        assert config.tokens * 2 * head_dim % config.tile == 0
        assert config.tokens * row <= max(kernel.RUN_BYTES, 64 * row)
        assert 8 * math.ceil(new / config.tokens) >= least
    assert kernel.heuristic(8, 131_072, head_dim, itemsize).tokens * row >= kernel.RUN_BYTES / 2


@pytest.mark.parametrize(
    "head_dim, new, dtype, match",
    [
        (32, 5, "float32", "head_dim is 32"),
        (64, 0, "float32", "0 rows for a store of 80"),
        (64, 81, "float32", "81 rows for a store of 80"),
        (64, 5, "int32", "dtype is int32"),
    ],
)
def test_says_what_it_does_not_support(head_dim, new, dtype, match):
    store = ops.Rows(jnp.zeros((LAYERS, BATCH, HEADS, TOKENS, 2, head_dim), dtype))
    with pytest.raises(NotImplementedError, match=match):
        kernel.append_rows(store, jnp.zeros((HEADS, new, 2, head_dim)), 0, 0, 0)
