"""The kernel's assembly, run in plain JAX within the interpreted kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.gguf_levels import levels_of
from pallas_kernels.levels import Levels
from pallas_kernels.multiply_levels import triton
from pallas_kernels.multiply_levels.triton import Config
from pallas_kernels.toolbox import launch
from tests.support import emulated_assembly
from tests.support.quantised_cases import PACKED, decoded, matrix_of_levels, random_blocks

OUT = 16


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(launch, "takes_assembly", lambda interpret: True)
    monkeypatch.setattr(launch, "assembly", emulated_assembly.assembly)


def cases():
    arrays, numbers = matrix_of_levels(4, 32, OUT, 256)
    scales = jnp.asarray(arrays["scales"], jnp.bfloat16)
    yield pytest.param(Levels(jnp.asarray(arrays["levels"]), scales), numbers, id="int4")
    for encoding in (x for x in PACKED if x.name.startswith("Q4")):
        data = random_blocks(encoding, (OUT, 256))
        matrix = Levels(**{name: jnp.asarray(x) for name, x in levels_of(data, encoding).items()})
        yield pytest.param(matrix, decoded(data, encoding).astype(np.float64), id=encoding.name)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("matrix, numbers", list(cases()))
def test_the_assembly_dequantises(matrix, numbers, dtype, pairs):
    """Numbers are seen one by one: the inputs are rows of one, and of zeros."""
    config = Config(rows=16, block=32, pairs=pairs, num_warps=1)
    seen = jnp.eye(256, dtype=dtype)[jnp.array([*range(16), *range(240, 256)])]
    found = triton.multiply_levels(seen, matrix, dtype=jnp.float32, config=config, interpret=True)
    numbers = numbers[:, np.r_[:16, 240:256]]
    error = np.abs(np.asarray(found, np.float64).T - numbers)
    # Each of at most a level's scale and a minimum is rounded, and their sum.
    bits = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    largest = np.abs(numbers).max(axis=1, keepdims=True)
    assert (error <= bits * (6 if matrix.minima is not None and pairs else 2) * largest).all()
    if matrix.minima is None and (matrix.scales.dtype == jnp.dtype(dtype) or not pairs):
        # A number of a few bits: rounded once, or not at all.
        rounded = np.asarray(jnp.asarray(numbers, jnp.float32).astype(dtype), np.float64)
        np.testing.assert_allclose(np.asarray(found).T, rounded, rtol=1e-6)
