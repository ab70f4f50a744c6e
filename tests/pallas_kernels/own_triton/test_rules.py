"""What our own lowering writes for numbers and tiles, run by NumPy: against JAX on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support.own_texts import computed, text_of

INTS = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 100], np.int32)
OTHERS = np.array([3, -2, 5, -7, 7, 2, 3, 31], np.int32)
WORDS = INTS.view(np.uint32)
FLOATS = np.array([0.0, -0.0, 1.5, -2.5, 3e38, -3e38, np.inf, 1e-3], np.float32)
MORE = np.array([2.0, 3.0, -0.5, 2.5, 1.0, 1.0, 1.0, 7.0], np.float32)


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
