"""`append_rows` on a CUDA GPU, into pinned host memory: every byte of the store, and its place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_kernels as ops
from pallas_kernels.rounding import quantise
from tests.support.gpu_cases import SEED

pytestmark = pytest.mark.gpu

LAYERS, BATCH, HEADS, TOKENS = 2, 2, 3, 3000
HOST = jax.memory.Space.Host


def host_store(rng, shape, dtype):
    """Random bits, NaN among them; and the same on the host's own memory."""
    kind = np.uint32 if jnp.dtype(dtype).itemsize == 4 else np.uint16
    bits = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    return jax.device_put(bits.view(jnp.dtype(dtype)), HOST), bits


def append_rows(store, rows, *at):
    """The op on the store's numbers alone."""
    return ops.append_rows(ops.Rows(store), rows, *at).data


def bits_of(array):
    # By way of the device: an array that NumPy has looked at where it lies cannot be donated.
    array = np.asarray(jax.device_put(array, jax.memory.Space.Device))
    return array.view(np.uint32 if array.itemsize == 4 else np.uint16)


def assert_in_place(program, store):
    """The compiled program keeps the store in host memory, and copies nothing of its size."""
    shape = ",".join(map(str, store.shape))
    lines = [line for line in program.as_text().splitlines() if f"[{shape}]" in line]
    assert not [line for line in lines if re.search(r" copy(-start|-done)?\(", line)]
    results = [line.split(" custom-call(")[0] for line in lines if " custom-call(" in line]
    assert results
    assert all("S(5)" in result for result in results), results


@pytest.mark.parametrize(
    "head_dim, dtype, rows_dtype",
    [
        (64, "bfloat16", "bfloat16"),
        (96, "bfloat16", "float32"),
        (96, "float16", "bfloat16"),
        (128, "float32", "float32"),
        (128, "bfloat16", "bfloat16"),
        (256, "float16", "float16"),
    ],
)
def test_append_rows(head_dim, dtype, rows_dtype):
    rng = np.random.default_rng(SEED)
    store, expected = host_store(rng, (LAYERS, BATCH, HEADS, TOKENS, 2, head_dim), dtype)
    address = store.unsafe_buffer_pointer()
    append = jax.jit(append_rows, donate_argnums=0)
    for new, start in ((1, 0), (1, TOKENS - 1), (1023, 777), (1024, TOKENS - 1024), (TOKENS, 0)):
        rows = jnp.asarray(rng.normal(size=(HEADS, new, 2, head_dim)), rows_dtype)
        at = [jnp.int32(i) for i in (rng.integers(LAYERS), rng.integers(BATCH), start)]
        assert_in_place(append.lower(store, rows, *at).compile(), store)
        store = append(store, rows, *at)
        written = bits_of(rows.astype(dtype))
        expected[int(at[0]), int(at[1]), :, start : start + new] = written
        np.testing.assert_array_equal(bits_of(store), expected, err_msg=f"seed {SEED}")
        assert store.unsafe_buffer_pointer() == address
        assert store.sharding.memory_kind == "pinned_host"


def test_rows_are_rounded_as_they_are_written():
    """Levels in host memory, scales on the device: both in place, every byte of both."""
    rng = np.random.default_rng(SEED)
    shape, new, start = (LAYERS, BATCH, HEADS, TOKENS, 2, 128), 1023, 777
    levels = rng.integers(-127, 128, shape, np.int8)
    scales = rng.normal(size=shape[:-1]).astype(np.float32)
    store = ops.Rows(jax.device_put(levels, HOST), jnp.asarray(scales))
    addresses = [x.unsafe_buffer_pointer() for x in store]
    rows = jnp.asarray(rng.normal(size=(HEADS, new, 2, 128)), jnp.bfloat16)
    store = jax.jit(ops.append_rows, donate_argnums=0)(store, rows, 1, 0, start)
    assert [x.unsafe_buffer_pointer() for x in store] == addresses
    assert store.data.sharding.memory_kind == "pinned_host"
    for held, expected, written in zip(store, (levels, scales), quantise(rows), strict=True):
        expected[1, 0, :, start : start + new] = written
        found = np.asarray(jax.device_put(held, jax.memory.Space.Device))
        np.testing.assert_array_equal(found, expected, err_msg=f"seed {SEED}")


def test_append_rows_in_a_loop():
    """As the index's growth does, inside a decode step."""
    rng = np.random.default_rng(SEED)
    store, expected = host_store(rng, (LAYERS, BATCH, HEADS, TOKENS, 2, 128), "bfloat16")
    rows = jnp.asarray(rng.normal(size=(4, HEADS, 100, 2, 128)), jnp.bfloat16)

    def run(store, rows, count):
        def append(i, store):
            return append_rows(store, rows[i], i % LAYERS, i // LAYERS, 50 + 7 * i)

        return lax.fori_loop(0, count, append, store)

    program = jax.jit(run, donate_argnums=0).lower(store, rows, jnp.int32(4)).compile()
    assert_in_place(program, store)
    address = store.unsafe_buffer_pointer()
    store = program(store, rows, jnp.int32(4))
    for i in range(4):
        start = 50 + 7 * i
        expected[i % LAYERS, i // LAYERS, :, start : start + 100] = bits_of(rows[i])
    np.testing.assert_array_equal(bits_of(store), expected, err_msg=f"seed {SEED}")
    assert store.unsafe_buffer_pointer() == address


def test_a_store_that_is_not_donated_stays_as_it_is():
    rng = np.random.default_rng(SEED)
    store, before = host_store(rng, (LAYERS, BATCH, HEADS, 64, 2, 128), "bfloat16")
    rows = jnp.ones((HEADS, 8, 2, 128), jnp.bfloat16)
    found = append_rows(store, rows, 1, 1, 56)
    expected = before.copy()
    expected[1, 1, :, 56:] = bits_of(rows)
    np.testing.assert_array_equal(bits_of(store), before)
    np.testing.assert_array_equal(bits_of(found), expected)


def test_append_rows_beyond_four_gigabytes():
    shape, new = (5, 1, 8, 262_144, 2, 128), 1000
    store = jax.device_put(np.zeros(shape, jnp.bfloat16), HOST)
    assert store.nbytes > 2**32
    address = store.unsafe_buffer_pointer()
    rows = jnp.asarray(np.random.default_rng(SEED).normal(size=(8, new, 2, 128)), jnp.bfloat16)
    start = shape[3] - new
    append = jax.jit(append_rows, donate_argnums=0)
    store = append(store, rows, jnp.int32(4), jnp.int32(0), jnp.int32(start))
    assert store.unsafe_buffer_pointer() == address
    found = bits_of(store)
    np.testing.assert_array_equal(found[4, 0, :, start:], bits_of(rows))
    # Nowhere else, and nothing at places that an offset of 32 bits would have come to.
    assert np.count_nonzero(found) == np.count_nonzero(bits_of(rows))
