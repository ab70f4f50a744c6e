"""Appended tokens' attention on a CUDA GPU: by cuDNN, in plain JAX, and by the op's kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from tests.pallas_kernels.attend_appended import test_attend_appended as cases
from tests.support.appended_cases import ROOM, check_attend
from tests.support.gpu_cases import SEED
from wavejax.attention.causal import implementation_for

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stored", [0, 1, 2048, 4321, ROOM])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "dtype, way, atol",
    [("bfloat16", "cudnn", 2e-2), ("float16", "cudnn", 5e-3), ("float32", "blocks", 1e-3)],
)
def test_it_is_what_float64_gives(stored, head_dim, dtype, way, atol):
    assert implementation_for(dtype, head_dim) == way
    check_attend(stored, dtype, head_dim, SEED + stored, atol)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "group, head_dim, dtype",
    [(3, 64, "bfloat16"), (7, 64, "float16"), (4, 128, "bfloat16"), (1, 96, "float32")],
)
def test_the_kernel_is_softmax_attention(kind, group, head_dim, dtype):
    case = cases.make_case(kind, group, head_dim, dtype)
    attend = jax.jit(functools.partial(ops.attend_appended, scale=0.3, implementation="triton"))
    numbers = [jnp.int32(x) for x in (cases.COUNT, cases.SEQUENCE, cases.LAYER)]
    found = attend(*case, *numbers)
    cases.check(found, case, cases.TOLERANCES[dtype])
    # Twice the same bits.
    assert (attend(*case, *numbers)[: cases.COUNT] == found[: cases.COUNT]).all()
