"""The op `multiply_levels`. Its meaning is in `reference.py`, its kernel is in `triton.py`."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.multiply_levels import reference, triton
from pallas_kernels.types import Levels

MOST_TOKENS = triton.MOST_TOKENS


def multiply_levels(
    inputs: Float[Array, "*batch in"],
    matrix: Levels,
    *,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch out"]:
    """Multiply a few tokens by a matrix in 8 or 4 bits, which is dequantised within the product.

    The matrix's numbers are rounded to the inputs' dtype, and products are summed in float32: what
    a matrix of floats gives, but for rounding. The kernel takes up to `MOST_TOKENS` tokens.

    Args:
        inputs: of a floating dtype; the axes before the last one are tokens.
        matrix: ``[out, in]``, without axes before. Levels of padding may be anything.
        dtype: the product's; None: the inputs'.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        the product, in `dtype`. Where a scale of a row is not finite, the row's product is not.
    """
    return dispatch.call(
        "multiply_levels",
        implementation,
        {"xla": reference.multiply_levels, "triton": triton.multiply_levels},
        inputs,
        matrix,
        dtype=dtype,
    )
