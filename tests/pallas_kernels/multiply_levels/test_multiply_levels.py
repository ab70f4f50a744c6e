"""`multiply_levels`: its meaning and its kernel, against the numbers in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.gguf_levels import levels_of
from pallas_kernels import multiply_levels
from pallas_kernels.levels import Levels
from pallas_kernels.multiply_levels import MOST_TOKENS, triton
from pallas_kernels.multiply_levels.triton import Config
from tests.support.lowering import lower_for, triton_modules
from tests.support.quantised_cases import PACKED, decoded, matrix_of_levels, random_blocks

OUT = 37  # no multiple of a tile
SMALL = Config(rows=16, block=32, num_warps=1, num_stages=2)
# Bits, group and columns: whole groups or not, groups of more bytes than a block, and of fewer.
OWN = [(4, 32, 96), (4, 32, 75), (4, 128, 256), (4, 8, 64), (8, 32, 64), (8, 16, 40), (8, 64, 192)]


def _cases():
    for bits, group, columns in OWN:
        arrays, numbers = matrix_of_levels(bits, group, OUT, columns)
        matrix = Levels(*(jnp.asarray(arrays[name]) for name in ("levels", "scales")))
        yield pytest.param(matrix, numbers, id=f"{bits}-{group}-{columns}")
    for encoding in PACKED:
        data = random_blocks(encoding, (OUT, 512))
        matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
        yield pytest.param(matrix, decoded(data, encoding).astype(np.float64), id=encoding.name)


CASES = list(_cases())


def inputs_of(tokens, columns, dtype="float32"):
    drawn = np.random.default_rng(tokens).normal(size=(tokens, columns))
    return jnp.asarray(drawn, dtype)


def assert_product(product, inputs, numbers, relative):
    inputs = np.asarray(inputs, np.float64)
    exact, size = inputs @ numbers.T, np.abs(inputs) @ np.abs(numbers).T
    assert np.abs(np.asarray(product, np.float64) - exact).max() <= relative * size.max()


interpreted = functools.partial(triton.multiply_levels, interpret=True)
BY_BOTH = {"plain": multiply_levels, "kernel": functools.partial(interpreted, config=SMALL)}


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("multiply", BY_BOTH.values(), ids=BY_BOTH)
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_the_product_is_that_of_the_numbers(matrix, numbers, multiply, tokens):
    inputs = inputs_of(tokens, numbers.shape[1])
    product = jax.jit(multiply)(inputs, matrix)
    assert (product.shape, product.dtype) == ((tokens, OUT), jnp.float32)
    assert_product(product, inputs, numbers, 1e-6)


@pytest.mark.parametrize("dtype, relative", [("bfloat16", 2**-7), ("float16", 2**-9)])
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_other_dtypes_and_more_axes(matrix, numbers, dtype, relative):
    inputs = inputs_of(6, numbers.shape[1], dtype)
    for multiply in BY_BOTH.values():
        product = multiply(inputs.reshape(2, 3, -1), matrix)
        assert (product.shape, product.dtype) == ((2, 3, OUT), jnp.dtype(dtype))
        assert_product(product.reshape(6, OUT), inputs, numbers, relative)
        wide = multiply(inputs, matrix, dtype=jnp.float32)
        assert wide.dtype == jnp.float32
        assert_product(wide, inputs, numbers, relative)


@pytest.mark.parametrize(
    "config",
    [
        Config(rows=64, block=64, splits=1),
        Config(rows=16, block=128, splits=2),
        # Of 9 blocks, and of 8: parts of no block, and of fewer than others.
        *(Config(rows=16, block=32, splits=n) for n in (3, 4, 5, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [512, 530])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_cut_gives_the_product(bits, columns, config):
    arrays, numbers = matrix_of_levels(bits, 32, OUT, columns)
    matrix = Levels(*(jnp.asarray(arrays[name]) for name in ("levels", "scales")))
    inputs = inputs_of(5, columns)
    assert_product(interpreted(inputs, matrix, config=config), inputs, numbers, 1e-6)


@pytest.mark.parametrize("block", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("encoding", PACKED[5:], ids=lambda encoding: encoding.name)
def test_factors_are_those_of_the_groups(encoding, block):
    """A block of part of a group, of some, and of the groups of several factors."""
    data = random_blocks(encoding, (OUT, 1024))
    matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
    inputs, config = inputs_of(2, 1024), Config(rows=16, block=block, splits=2)
    numbers = decoded(data, encoding).astype(np.float64)
    assert_product(interpreted(inputs, matrix, config=config), inputs, numbers, 1e-6)


def test_all_tokens_and_the_own_choice():
    for encoding in (PACKED[1], PACKED[5]):
        data = random_blocks(encoding, (OUT, 2048))
        matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
        numbers = decoded(data, encoding).astype(np.float64)
        for tokens in (MOST_TOKENS - 1, MOST_TOKENS):
            inputs = inputs_of(tokens, 2048, "bfloat16")
            assert_product(interpreted(inputs, matrix), inputs, numbers, 2**-7)


@pytest.mark.parametrize("multiply", BY_BOTH.values(), ids=BY_BOTH)
def test_what_is_not_finite_shows_where_it_is(multiply):
    arrays, _ = matrix_of_levels(4, 32, OUT, 96)
    arrays["scales"][5, 1] = np.nan
    matrix = Levels(*(jnp.asarray(arrays[name]) for name in ("levels", "scales")))
    inputs = inputs_of(3, 96).at[1, 40].set(jnp.nan)
    finite = np.isfinite(np.asarray(multiply(inputs, matrix)))
    expected = np.ones((3, OUT), bool)
    expected[1] = expected[:, 5] = False
    assert (finite == expected).all()


def test_what_the_kernel_does_not_know():
    arrays, _ = matrix_of_levels(4, 32, OUT, 96)
    matrix = Levels(*(jnp.asarray(arrays[name]) for name in ("levels", "scales")))
    for tokens in (0, MOST_TOKENS + 1):
        with pytest.raises(NotImplementedError, match="1 to 32"):
            interpreted(jnp.zeros((tokens, 96)), matrix)
    for group in (4, 24):
        arrays, _ = matrix_of_levels(4, group, OUT, 96)
        odd = Levels(*(jnp.asarray(arrays[name]) for name in ("levels", "scales")))
        with pytest.raises(NotImplementedError, match="groups of 2"):
            interpreted(jnp.zeros((1, 96)), odd)
    with pytest.raises(NotImplementedError, match="int32"):
        interpreted(jnp.zeros((1, 96), jnp.int32), matrix)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_kernel_lowers(dtype, platform):
    """With assembly for NVIDIA's GPUs, without for others."""
    for encoding in PACKED:
        data = random_blocks(encoding, (OUT, 2048))
        matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
        config = Config(rows=32, block=64, splits=2, pairs=encoding.name == "Q4_K")
        inputs = jnp.zeros((9, 2048), dtype)
        multiply = functools.partial(triton.multiply_levels, config=config)
        text = lower_for(platform, multiply, inputs, matrix)
        [module] = triton_modules(text)["multiply_levels"]
        by_assembly = platform == "cuda" and matrix.bits == 4
        assert ("elementwise_inline_asm" in module) == by_assembly
        assert ("fma.rn" in module) == (by_assembly and config.pairs and dtype != "float32")
