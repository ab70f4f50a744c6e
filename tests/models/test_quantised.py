"""Products with quantised matrices are those of their numbers, in every format and form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import quantised
from models.checkpoints.gguf_levels import FORMATS, levels_of
from models.checkpoints.levels import converted, quantise
from models.formats import INT4, INT8, WeightFormat, common_format
from models.layer import linear
from models.quantised import QuantisedMatrix, look_up, matrix_axes
from pallas_kernels.multiply_levels.reference import FEW_ROWS
from tests.support.lowering import lower_for
from tests.support.quantised_cases import PACKED, decoded, matrix_of_levels, random_blocks

OUT = 7  # odd
OWN = [(8, None, 24), (8, None, 33), (8, 32, 20), (4, 32, 64), (4, 64, 100), (4, 32, 33), (4, 2, 5)]
TOKENS = [0, 1, 3, FEW_ROWS + 3]


def as_matrix(arrays, columns, dtype="float32"):
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    return QuantisedMatrix(**arrays, columns=columns, dtype=jnp.dtype(dtype))


def packed(encoding, shape=(OUT, 512), seed=0):
    data = random_blocks(encoding, shape, seed)
    arrays = levels_of(data, encoding)
    return as_matrix(arrays, shape[-1]), decoded(data, encoding).astype(np.float64)


def _cases():
    for bits, group, columns in OWN:
        arrays, numbers = matrix_of_levels(bits, group, OUT, columns)
        yield pytest.param(as_matrix(arrays, columns), numbers, id=f"{bits}-{group}-{columns}")
    for encoding in PACKED:
        yield pytest.param(*packed(encoding), id=encoding.name)


CASES = list(_cases())


def inputs_of(tokens, columns, dtype="float32"):
    drawn = np.random.default_rng(tokens).normal(size=(2, tokens, columns))
    return jnp.asarray(drawn, dtype)


def assert_product(product, inputs, numbers, relative):
    inputs = np.asarray(inputs, np.float64)
    exact, size = inputs @ numbers.T, np.abs(inputs) @ np.abs(numbers).T
    error = np.abs(np.asarray(product, np.float64) - exact)
    assert error.max(initial=0) <= relative * size.max(initial=0)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_the_product_is_that_of_the_numbers(matrix, numbers, tokens):
    inputs = inputs_of(tokens, matrix.columns)
    product = jax.jit(linear)(inputs, matrix)
    assert (product.shape, product.dtype) == ((2, tokens, OUT), jnp.float32)
    assert_product(product, inputs, numbers, 1e-6)


@pytest.mark.parametrize("dtype, relative", [("bfloat16", 2**-7), ("float16", 2**-9)])
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_the_product_in_other_dtypes(matrix, numbers, dtype, relative):
    inputs = inputs_of(3, matrix.columns, dtype)
    product = linear(inputs, matrix)
    assert product.dtype == jnp.dtype(dtype)
    assert_product(product, inputs, numbers, relative)
    wide = linear(inputs, matrix, jnp.float32)
    assert wide.dtype == jnp.float32
    assert_product(wide, inputs, numbers, relative)


def test_sums_of_levels_do_not_pass_float16():
    """A row of the largest levels times large inputs is past 65504 before it is scaled."""
    levels = jnp.full((2, 64), 127, jnp.int8)
    scales = jnp.full((2, 1), 1e-4, jnp.float32)
    matrix = QuantisedMatrix(levels, scales, columns=64, dtype=jnp.dtype("float16"))
    product = linear(jnp.full((1, 64), 30, jnp.float16), matrix)
    np.testing.assert_allclose(product, 64 * 127 * 1e-4 * 30, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_the_sums_that_gpus_make_of_few_tokens(matrix, numbers, tokens, monkeypatch):
    def on_a_gpu(*args, cuda, **others):
        return cuda(*args)

    monkeypatch.setattr(quantised.lax, "platform_dependent", on_a_gpu)
    inputs = inputs_of(tokens, matrix.columns)
    assert_product(linear(inputs, matrix), inputs, numbers, 1e-6)
    rounded = inputs.astype(jnp.bfloat16)
    product = linear(rounded, matrix)
    assert product.dtype == jnp.bfloat16
    assert_product(product, rounded, numbers, 2**-7)


@pytest.mark.parametrize("matrix, numbers", CASES)
def test_rows_are_looked_up(matrix, numbers):
    rows = jnp.array([[6, 0], [3, 3]])
    np.testing.assert_allclose(look_up(matrix, rows), numbers[np.asarray(rows)], rtol=1e-6)


@pytest.mark.parametrize("encoding", PACKED, ids=lambda encoding: encoding.name)
def test_what_gguf_holds_is_kept_exactly(encoding):
    """Each number is the gguf package's, in the encoding's own format and in every common one."""
    data = random_blocks(encoding, (OUT, 512))
    arrays, own, numbers = levels_of(data, encoding), FORMATS[encoding], decoded(data, encoding)
    sizes = own.arrays((OUT, 512))
    assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == sizes
    # XLA may round a product and a sum once in place of twice.
    exact = {"rtol": 0, "atol": 1e-7 * np.abs(numbers).max()}
    np.testing.assert_allclose(as_matrix(arrays, 512).dequantise(), numbers, **exact)
    for other in FORMATS.values():
        wanted = common_format([own, other])
        again = {
            name: x.astype(wanted.arrays((OUT, 512))[name][1])
            for name, x in converted(arrays, own, wanted).items()
        }
        matrix = as_matrix(again, 512)
        assert matrix.format == wanted
        np.testing.assert_allclose(matrix.dequantise(), numbers, **exact)


@pytest.mark.parametrize("format, most", [(INT8, 0.5), (INT4, 1.0)], ids=["int8", "int4"])
@pytest.mark.parametrize("columns", [64, 33])
def test_levels_are_near_their_numbers(format, most, columns):
    rng = np.random.default_rng(5)
    numbers = rng.normal(size=(9, columns)).astype(np.float32)
    numbers[4] = 0
    numbers[5, 3] = 1e4  # one number that takes all of a group's levels
    numbers[6] *= 1e-30
    matrix = as_matrix(quantise(numbers, format), columns)
    assert matrix.format == format
    assert matrix.shape == numbers.shape
    scales = np.abs(np.asarray(matrix.scales, np.float64))
    group = format.group or columns
    each = np.repeat(scales, group, axis=-1)[:, :columns]
    error = np.abs(np.asarray(matrix.dequantise(), np.float64) - numbers)
    # The scales of 4 bits are rounded to bfloat16.
    assert (error <= each * (most + (0.05 if format.bits == 4 else 1e-4))).all()
    assert (np.asarray(matrix.dequantise())[4] == 0).all()
    # The largest number of a row, and of a group, is among the levels.
    assert error[5, 3] <= 1e4 * 2**-8


def test_what_is_not_finite_shows_in_the_scales():
    for bad in (np.nan, np.inf, -np.inf):
        numbers = np.ones((2, 32), np.float32)
        numbers[1, 7] = bad
        for format in (INT8, INT4):
            scales = quantise(numbers, format)["scales"].astype(np.float32)
            assert np.isfinite(scales).tolist() == [[True], [False]]
    # A packed scale that is not finite makes numbers that are not.
    arrays, _ = matrix_of_levels(4, 32, 2, 64)
    arrays["scales"][1, 1] = np.nan
    product = np.asarray(linear(jnp.ones((1, 64)), as_matrix(arrays, 64)))
    assert np.isfinite(product).tolist() == [[True, False]]


def test_bytes_are_those_of_the_format():
    assert INT8.nbytes((3, 10, 64)) == 3 * 10 * (64 + 4)
    assert INT4.nbytes((10, 64)) == 10 * (32 + 2 * 2)
    assert INT4.nbytes((10, 65)) == 10 * (48 + 3 * 2)
    for encoding, format in FORMATS.items():
        matrix, numbers = packed(encoding)
        assert matrix.format == format
        assert matrix.nbytes == format.nbytes(numbers.shape)
    # 4 bits, an eighth of a bit for each of 32 numbers' scales and minima, and two factors.
    assert FORMATS[PACKED[5]].nbytes((1, 256)) == 128 + 8 + 8 + 2 + 2
    with pytest.raises(ValueError, match="even size"):
        WeightFormat(4, None, "float32")


def test_axes_have_names():
    matrix, _ = packed(PACKED[5])
    stack = jax.tree.map(lambda x: x[None], matrix)
    names = matrix_axes(stack, ("layers", "mlp", "embed"))
    assert names.levels == names.scales == names.minima == P("layers", "mlp", "embed")
    arrays, _ = matrix_of_levels(8, None, OUT, 24)
    assert matrix_axes(as_matrix(arrays, 24), ("mlp", "embed")).scales == P("mlp", None)


def lowered(matrix, tokens):
    inputs = jnp.zeros((1, tokens, matrix.columns), jnp.bfloat16)
    return lower_for("cuda", lambda x, matrix: linear(x, matrix), inputs, matrix)


def test_few_tokens_need_no_float_matrix_on_a_gpu():
    """As sums any conversion is fused; a matrix product would want scaled groups in memory."""
    matrix, _ = packed(PACKED[5])
    assert "dot_general" not in lowered(matrix, FEW_ROWS)
    assert "dot_general" in lowered(matrix, FEW_ROWS + 1)
    arrays, _ = matrix_of_levels(8, None, OUT, 24)
    by_channel = as_matrix(arrays, 24)
    # Of a channel the levels are the operand, with no scale before the product.
    text = lowered(by_channel, 1)
    assert text.index("dot_general") < text.index("multiply")


def test_a_stack_is_never_floats():
    """A scan over layers dequantises the layer that it is at, and only then."""
    matrices = [packed(PACKED[2], (64, 64), seed)[0] for seed in range(5)]
    stack = jax.tree.map(lambda *each: jnp.stack(each), *matrices)

    def run(inputs, stack):
        return jax.lax.scan(lambda x, matrix: (linear(x, matrix), None), inputs, stack)[0]

    inputs = jnp.ones((9, 64))
    text = lower_for("cuda", run, inputs, stack)
    assert "tensor<5x64x32xui8>" in text
    assert not [size for size in ("5x64x64x", "5x64x2x32x") if f"tensor<{size}f32" in text]
    expected = inputs
    for matrix in matrices:
        expected = linear(expected, matrix)
    np.testing.assert_allclose(run(inputs, stack), expected, rtol=1e-5)
    assert stack.shape == (5, 64, 64)
