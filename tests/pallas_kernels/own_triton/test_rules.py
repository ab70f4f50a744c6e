"""What our own lowering writes for each primitive, run by NumPy: against JAX on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend, own_triton
from pallas_kernels.own_triton import call
from tests.support import evaluated_kernels
from tests.support.ttir_evaluator import evaluate

INTS = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 100], np.int32)
OTHERS = np.array([3, -2, 5, -7, 7, 2, 3, 31], np.int32)
WORDS = INTS.view(np.uint32)
FLOATS = np.array([0.0, -0.0, 1.5, -2.5, 3e38, -3e38, np.inf, 1e-3], np.float32)
MORE = np.array([2.0, 3.0, -0.5, 2.5, 1.0, 1.0, 1.0, 7.0], np.float32)


def computed(function, *operands, grid=(1,), shape=None, aliases=None):
    """A kernel's only result, by the text that it becomes: `function` of all of each operand."""
    expected = jax.eval_shape(function, *operands) if shape is None else shape

    def kernel(*refs):
        *inputs, output = refs
        output[...] = function(*(ref[...] for ref in inputs))

    return by_text(kernel, expected, *operands, grid=grid, aliases=aliases)


def by_text(kernel, out, *operands, grid=(1,), aliases=None):
    run = evaluated_kernels.pallas_call(
        kernel,
        name="kernel",
        out_shape=out,
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=jax.tree.map(lambda _: pl.no_block_spec, out),
        input_output_aliases=aliases or {},
    )
    return jax.tree.map(np.asarray, run(*operands))


def text_of(kernel, out, *operands, platform="cuda", grid=(1,), name="kernel"):
    trace = call.traced(
        kernel,
        num_warps=4,
        num_stages=2,
        name=name,
        out_shape=out,
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
    )
    return trace(*operands)[0].text(platform)


ELEMENTWISE = {
    "add": (lambda x, y: x + y, (INTS, OTHERS)),
    "subtract": (lambda x, y: x - y, (WORDS, OTHERS.view(np.uint32))),
    "multiply": (lambda x, y: x * y, (INTS, OTHERS)),
    "multiply floats": (lambda x, y: x * y, (FLOATS, MORE)),
    "divide": (lax.div, (INTS, OTHERS)),
    "divide words": (lax.div, (WORDS, np.arange(1, 9, dtype=np.uint32))),
    "divide floats": (lambda x, y: x / y, (FLOATS, MORE)),
    "remainder": (lax.rem, (INTS, OTHERS)),
    "floor divide": (lambda x, y: x // y, (INTS[:5], OTHERS[:5])),
    "modulo": (lambda x, y: x % y, (INTS[:5], OTHERS[:5])),
    "larger": (jnp.maximum, (INTS, OTHERS)),
    "larger words": (jnp.maximum, (WORDS, OTHERS.view(np.uint32))),
    "smaller floats": (jnp.minimum, (FLOATS, MORE)),
    "and": (lambda x, y: x & y, (INTS, OTHERS)),
    "or": (lambda x, y: x | y, (INTS > 0, OTHERS > 0)),
    "not": (lambda x: ~x, (INTS,)),
    "not bool": (lambda x: ~(x > 0), (INTS,)),
    "shift left": (lambda x, y: x << (y & 31), (INTS, OTHERS)),
    "shift right": (lambda x, y: x >> (y & 31), (INTS, OTHERS)),
    "shift words right": (lambda x, y: x >> (y & 31), (WORDS, OTHERS.view(np.uint32))),
    "shift right logically": (lambda x: lax.shift_right_logical(x, 3), (INTS,)),
    "less": (lambda x, y: x < y, (INTS, OTHERS)),
    "less of words": (lambda x, y: x < y, (WORDS, OTHERS.view(np.uint32))),
    "not more of floats": (lambda x, y: x <= y, (FLOATS, MORE)),
    "same as NaN": (lambda x: (x - x) == (x - x), (FLOATS,)),
    "other than NaN": (lambda x: (x - x) != 0, (FLOATS,)),
    "sign": (lambda x: jnp.sign(x), (INTS,)),
    "absolute": (lambda x: jnp.abs(x), (FLOATS,)),
    "square": (lambda x: x**2, (MORE,)),
    "exp": (lambda x: jnp.exp(x), (MORE,)),
    "exp2": (lambda x: jnp.exp2(x), (MORE,)),
    "log": (lambda x: jnp.log(jnp.abs(x)), (MORE,)),
    "log2": (lambda x: jnp.log2(jnp.abs(x)), (MORE,)),
    "square root": (lambda x: jnp.sqrt(jnp.abs(x)), (MORE,)),
    "floor": (lambda x: jnp.floor(x), (FLOATS,)),
    "ceil": (lambda x: jnp.ceil(x), (FLOATS,)),
    "choose": (lambda x, y: jnp.where(x > y, x, 9), (INTS, OTHERS)),
    "bits of floats": (lambda x: lax.bitcast_convert_type(x, jnp.int32), (FLOATS,)),
    "floats of bits": (lambda x: lax.bitcast_convert_type(x, jnp.float32), (OTHERS,)),
    "words of ints": (lambda x: lax.bitcast_convert_type(x, jnp.uint32), (INTS,)),
    "ints to floats": (lambda x: x.astype(jnp.float32), (INTS,)),
    "words to floats": (lambda x: x.astype(jnp.float32), (WORDS,)),
    "floats to ints": (lambda x: x.astype(jnp.int32), (np.array([1.9, -1.9, 0, 5], np.float32),)),
    "floats past ints": (lambda x: x.astype(jnp.int8), (np.array([1e9, -1e9], np.float32),)),
    "floats to bfloat16": (lambda x: x.astype(jnp.bfloat16), (FLOATS[:4] * np.float32(1.003),)),
    "bfloat16 to float16": (
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float16),
        (MORE,),
    ),
    "bytes to bfloat16": (lambda x: x.astype(jnp.bfloat16), (np.arange(-4, 4, dtype=np.int8),)),
    "bools to ints": (lambda x: (x > 0).astype(jnp.int32), (INTS,)),
    "ints to bools": (lambda x: x.astype(bool), (INTS,)),
    "words to bytes": (lambda x: x.astype(jnp.int8), (INTS,)),
    "halves to words": (lambda x: x.astype(jnp.int32), (np.array([65535, 1], np.uint16),)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements(name):
    function, operands = ELEMENTWISE[name]
    size = 1 << (len(operands[0]) - 1).bit_length()
    operands = [jnp.asarray(np.resize(x, size)) for x in operands]
    found, expected = computed(function, *operands), np.asarray(function(*operands))
    assert found.dtype == expected.dtype
    tolerance = 2e-6 if found.dtype == np.float32 else 0
    np.testing.assert_allclose(
        found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("function, best", [(jnp.maximum, 2.0), (jnp.minimum, 1.0)])
def test_the_larger_of_a_number_and_nan_is_the_number(function, best):
    """As with JAX's own backend for GPUs, but not as with JAX on arrays."""
    x, y = jnp.array([np.nan, 1.0, 2.0, 1.0]), jnp.array([best, np.nan, 1.0, 2.0])
    found = computed(function, x, y)
    np.testing.assert_array_equal(found, [best, 1.0, *([2.0, 2.0] if best == 2 else [1.0, 1.0])])


MATRIX = np.arange(32, dtype=np.int32).reshape(4, 8) * 37 % 11
SHAPES = {
    "sum of rows": (lambda x: jnp.sum(x, axis=1), (MATRIX,)),
    "sum of columns": (lambda x: jnp.sum(x, axis=0), (MATRIX.astype(np.float32),)),
    "largest of all": (lambda x: jnp.broadcast_to(jnp.max(x), (4,)), (MATRIX,)),
    "least word": (
        lambda x: jnp.broadcast_to(jnp.min(x), (4,)),
        (WORDS,),
    ),
    "running sum": (lambda x: jnp.cumsum(x), (OTHERS,)),
    "transpose": (lambda x: x.T, (MATRIX,)),
    "numbers along rows": (lambda x: lax.broadcasted_iota(jnp.int32, x.shape, 1) + x, (MATRIX,)),
    "numbers down columns": (lambda x: lax.broadcasted_iota(jnp.int32, x.shape, 0) + x, (MATRIX,)),
    "new axes": (lambda x: x[:, None] * x[None, :], (OTHERS,)),
    "reshape": (lambda x: x.reshape(2, 16), (MATRIX,)),
    "one axis less": (lambda x: x.reshape(4, 8, 1)[:, :, 0], (MATRIX,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tiles(name):
    function, operands = SHAPES[name]
    operands = [jnp.asarray(x) for x in operands]
    if name == "one axis less":
        function = lambda x: lax.squeeze(x.reshape(4, 8, 1), (2,))  # noqa: E731
    np.testing.assert_array_equal(computed(function, *operands), function(*operands))


@pytest.mark.parametrize("contract", [(1, 0), (1, 1), (0, 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products(contract, dtype):
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=(16, 16)), dtype) for _ in range(2))

    def product(a, b):
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        exact = lax.Precision.HIGHEST if dtype == "float32" else lax.Precision.DEFAULT
        return lax.dot_general(
            a, b, dimensions, precision=exact, preferred_element_type=jnp.float32
        )

    np.testing.assert_allclose(computed(product, a, b), product(a, b), rtol=1e-4, atol=1e-5)


def test_float32_is_rounded_to_tf32_only_where_it_may():
    x = jnp.ones((16, 16))

    def kernel(precision):
        def body(a, b, out):
            out[...] = jnp.dot(a[...], b[...], precision=precision)

        return body

    out = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    exact = text_of(kernel(lax.Precision.HIGHEST), out, x, x)
    rounded = text_of(kernel(lax.Precision.DEFAULT), out, x, x)
    assert "inputPrecision = ieee" in exact
    assert "inputPrecision = tf32" in rounded


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
