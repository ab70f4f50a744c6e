"""Appended tokens' attention on a CUDA GPU: by cuDNN in 16 bits, in plain JAX in float32."""

import pytest

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
