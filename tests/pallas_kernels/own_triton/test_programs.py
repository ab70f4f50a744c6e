"""What our own lowering makes of memory, loops and grids, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend, own_triton
from pallas_kernels.own_triton import call
from tests.support.own_texts import by_text, computed, text_of
from tests.support.ttir_evaluator import evaluate


def test_loads_and_stores_under_masks():
    """Of scalars, tensors and slices; what is masked is neither read nor written."""
    rows = jnp.arange(40, dtype=jnp.float32).reshape(5, 8)
    flags = jnp.asarray(np.arange(8) % 3 == 0)

    def kernel(rows, flags, _, out, bools):
        i = pl.program_id(0)
        at = jnp.arange(4) + 6
        taken = backend.load(rows.at[i, at], mask=at < 8, other=-1)
        backend.store(out.at[i, jnp.arange(4)], taken, mask=jnp.arange(4) != 2)
        whole = rows[i]  # a slice
        backend.store(out.at[i, 4], jnp.sum(whole))
        flag = backend.load(flags.at[at], mask=at < 8, other=True)
        backend.store(bools.at[i, at - 6], ~flag, mask=at < 9)

    before = jnp.full((5, 8), 77.0)
    shapes = (jax.ShapeDtypeStruct((5, 8), jnp.float32), jax.ShapeDtypeStruct((5, 4), jnp.bool_))
    found, bools = by_text(kernel, shapes, rows, flags, before, grid=(5,), aliases={2: 0})
    expected = np.full((5, 8), 77.0)
    expected[:, :2] = np.asarray(rows)[:, 6:]
    expected[:, 3], expected[:, 4] = -1, np.asarray(rows).sum(1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(bools[:, :2], np.broadcast_to(~np.asarray(flags)[6:], (5, 2)))
    assert not bools[:, 2].any()


def test_a_load_past_the_end_is_found():
    """The evaluator is as strict as a GPU is not, or else masks would not be tested."""

    def kernel(x, out):
        out[...] = backend.load(x.at[jnp.arange(4) + 6])

    text = text_of(kernel, jax.ShapeDtypeStruct((4,), jnp.float32), jnp.zeros(8))
    with pytest.raises(IndexError, match="element 6 to 9 of 8"):
        evaluate(text, (1, 1, 1), [np.zeros(8, np.float32), np.zeros(4, np.float32)])


def test_loops_and_branches():
    def function(x, most):
        def add(i, carry):
            total, seen = carry
            bigger = jnp.where(i % 2 == 0, total + x * i, total)
            return lax.cond(i > 3, lambda: bigger, lambda: bigger + 1), seen + 1

        known = lax.fori_loop(0, 5, add, (jnp.zeros_like(x), jnp.int32(0)))
        counted = lax.fori_loop(2, most, add, known)
        by_test = lax.while_loop(
            lambda c: c[1] < 40, lambda c: (c[0] - 1, c[1] * 2, c[2]), (*counted, x)
        )
        return by_test[0] + by_test[1] + lax.cond(most > 7, lambda: x, lambda: x * 2)

    x = jnp.arange(8, dtype=jnp.int32)
    for most in (0, 2, 7, 8, 9):
        found = computed(function, x, jnp.int32(most))
        np.testing.assert_array_equal(found, function(x, jnp.int32(most)))


def test_a_loop_whose_test_alone_reads_a_number():
    """The number is carried on: Triton before 3.9 fails where the loop's body drops it."""

    def function(x, ends):
        def step(carry):
            i, _, total = carry
            return i + 1, lax.dynamic_index_in_dim(ends, i + 1, keepdims=False), total + x * i

        return lax.while_loop(lambda c: c[1] < 5, step, (jnp.int32(0), ends[0], x))[2]

    def kernel(x, ends, out):
        def step(carry):
            i, _, total = carry
            return i + 1, backend.load(ends.at[i + 1]), total + x[...] * i

        start = (jnp.int32(0), backend.load(ends.at[0]), x[...])
        out[...] = lax.while_loop(lambda c: c[1] < 5, step, start)[2]

    x, ends = jnp.arange(8, dtype=jnp.int32), jnp.array([0, 2, 4, 4, 9, 1], jnp.int32)
    found = by_text(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ends)
    np.testing.assert_array_equal(found, function(x, ends))
    text = text_of(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ends)
    assert "arith.maxsi" in text


def test_programs_are_found_along_three_axes_and_past_cudas_limits():
    def kernel(out):
        at = tuple(pl.program_id(axis) for axis in range(len(out.shape)))
        backend.store(out.at[at], sum(i * 10**axis for axis, i in enumerate(at)))

    for grid in ((3, 2, 4), (1, 5), (2, 1, 2, 3)):
        found = by_text(kernel, jax.ShapeDtypeStruct(grid, jnp.int32), grid=grid)
        expected = sum(i * 10**axis for axis, i in enumerate(np.indices(grid)))
        np.testing.assert_array_equal(found, expected)
    trace = call.traced(
        kernel,
        num_warps=4,
        num_stages=2,
        name="kernel",
        out_shape=jax.ShapeDtypeStruct((2, 70_000), jnp.int32),
        grid=(2, 70_000),
        in_specs=[],
        out_specs=pl.no_block_spec,
    )
    made, *_ = trace()
    assert made.launch_grid == (140_000, 1, 1)
    array = np.zeros((2, 70_000), np.int32)
    evaluate(made.text("cuda"), (12, 1, 1), [array])
    assert array[:, :6].tolist() == [[0, 10, 20, 30, 40, 50], [1, 11, 21, 31, 41, 51]]


def test_atomic_additions_barriers_and_assembly(monkeypatch):
    monkeypatch.setenv("WAVEJAX_TRITON", "own")

    def add(counter, _, out):
        backend.store(out.at[pl.program_id(0)], backend.atomic_add(counter, (jnp.int32(1),), 3))
        backend.debug_barrier()

    shapes = (jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32))
    counter, before = by_text(
        lambda x, a, b: add(a, x, b), shapes, jnp.arange(4, dtype=jnp.int32), grid=(3,),
        aliases={0: 0},
    )  # fmt: skip
    assert counter.tolist() == [0, 10, 2, 3]
    assert before.tolist() == [1, 4, 7]

    def assemble(x, out):
        out[...] = own_triton.inline_assembly(
            'mov.b32 $0, $1; // "a\\b"\n', [x[...]], "=r,r", jnp.uint32
        )

    x = jnp.arange(8, dtype=jnp.int32)
    text = text_of(assemble, jax.ShapeDtypeStruct((8,), jnp.uint32), x)
    assert r'tt.elementwise_inline_asm "mov.b32 $0, $1; // \22a\5Cb\22\0A"' in text
    assert 'constraints = "=r,r", packed_element = 1 : i32, pure = true' in text


def test_offsets_take_64_bits_where_32_do_not_hold_them():
    def kernel(x, out):
        out[...] = backend.load(x.at[pl.program_id(0), jnp.arange(8)])

    def wide(size):
        rows = jax.ShapeDtypeStruct((size, 2**20), jnp.int8)
        return "i64" in text_of(kernel, jax.ShapeDtypeStruct((8,), jnp.int8), rows, grid=(size,))

    assert not wide(2**11 - 1)
    assert wide(2**11)


def test_what_is_not_known_is_refused_by_name():
    out = jax.ShapeDtypeStruct((8,), jnp.float32)

    def sort(x, out):
        out[...] = jnp.sort(x[...])

    with pytest.raises(NotImplementedError, match="no rule for sort, which my_kernel holds"):
        text_of(sort, out, jnp.zeros(8), name="my_kernel")

    def tangent(x, out):
        out[...] = jnp.exp(x[...].astype(jnp.float16)).astype(jnp.float32)

    with pytest.raises(NotImplementedError, match="exp of float16"):
        text_of(tangent, out, jnp.zeros(8))


def test_functions_are_of_the_platforms_library():
    out = jax.ShapeDtypeStruct((8,), jnp.float32)

    def kernel(x, out):
        out[...] = jnp.exp(x[...])

    assert "__nv_expf" in text_of(kernel, out, jnp.zeros(8))
    assert "__ocml_exp_f32" in text_of(kernel, out, jnp.zeros(8), platform="rocm")
