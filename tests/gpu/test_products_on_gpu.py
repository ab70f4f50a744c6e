"""Products with matrices in groups on a CUDA GPU: the kernel, and the model's own choice of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.checkpoints.gguf_levels import levels_of
from models.layer import linear
from models.quantised import QuantisedMatrix
from pallas_kernels.levels import Levels
from pallas_kernels.multiply_levels import triton
from pallas_kernels.multiply_levels.triton import Config
from tests.support.gpu_cases import run_twice
from tests.support.quantised_cases import PACKED, decoded, matrix_of_levels, random_blocks

pytestmark = pytest.mark.gpu

OUT, COLUMNS = 200, 2048  # no multiple of a tile's rows


def _cases():
    for bits, group, columns in ((4, 32, 2000), (4, 128, 2048), (8, 64, 2048), (4, 8, 512)):
        arrays, numbers = matrix_of_levels(bits, group, OUT, columns)
        scales = jnp.asarray(arrays["scales"], jnp.bfloat16)
        matrix = Levels(jnp.asarray(arrays["levels"]), scales)
        yield pytest.param(matrix, numbers, id=f"{bits}-{group}-{columns}")
    for encoding in PACKED:
        data = random_blocks(encoding, (OUT, COLUMNS))
        matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
        yield pytest.param(matrix, decoded(data, encoding).astype(np.float64), id=encoding.name)


CASES = list(_cases())


def check(multiply, matrix, numbers, tokens, dtype):
    """Compare with float64, and with the same once more."""
    drawn = np.random.default_rng(tokens).normal(size=(tokens, numbers.shape[1]))
    inputs = jnp.asarray(drawn, dtype)
    found = run_twice(multiply, inputs, matrix)
    given = np.asarray(inputs, np.float64)
    size = (np.abs(given) @ np.abs(numbers).T).max()
    error = np.abs(np.asarray(found, np.float64) - given @ numbers.T).max()
    assert error <= size * {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]


@pytest.mark.parametrize(
    "dtype, tokens", [("bfloat16", 1), ("bfloat16", 32), ("float16", 9), ("float32", 9)]
)
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_the_kernel_multiplies(matrix, numbers, dtype, tokens):
    check(triton.multiply_levels, matrix, numbers, tokens, dtype)


@pytest.mark.parametrize(
    "config",
    [
        Config(rows=128, block=64, splits=3, pairs=True),
        # A matrix unit's product of four warps, and one warp alone.
        Config(rows=128, block=128, splits=2, pairs=True, num_warps=4, num_stages=3),
        Config(rows=64, block=64, num_warps=4),
        Config(rows=16, block=64, splits=4, pairs=True, num_warps=1),
        Config(rows=32, block=256, num_stages=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("matrix, numbers", CASES)
def test_other_configs(matrix, numbers, config):
    for tokens in (8, 17):
        multiply = functools.partial(triton.multiply_levels, config=config)
        check(multiply, matrix, numbers, tokens, "bfloat16")


def test_a_model_takes_the_kernel():
    data = random_blocks(PACKED[5], (OUT, COLUMNS))
    arrays = {name: jnp.asarray(x) for name, x in levels_of(data, PACKED[5]).items()}
    matrix = QuantisedMatrix(**arrays, columns=COLUMNS, dtype=jnp.dtype(jnp.bfloat16))
    ops.forget()
    for tokens in (1, 16, 40):
        jax.jit(lambda x, m: linear(x, m))(jnp.ones((tokens, 1, COLUMNS), jnp.bfloat16), matrix)
    assert [choice.implementation for choice in ops.explain()] == ["triton"]
