"""The op `merge_states`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.merge_states import reference, triton


def merge_states(
    outputs: Float[Array, "parts batch kv_heads group head_dim"],
    logsumexps: Float[Array, "parts batch kv_heads group"],
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "batch kv_heads group head_dim"],
    Float[Array, "batch kv_heads group"],
]:
    """Merge attention over disjoint sets of tokens into attention over their union.

    Args:
        outputs: float32, each part's softmax-weighted mean of values.
        logsumexps: float32, each part's log of the sum of exponentials; about -1e30 for a part
            with nothing in it, whose output is not read. NaN in either reaches the union.
        dtype: of the union's output.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        output, logsumexp: in `dtype` and float32, of the union; zeros and about -1e30 where all
            parts are empty.
    """
    return dispatch.call(
        "merge_states",
        implementation,
        {"xla": reference.merge_states, "triton": triton.merge_states},
        outputs,
        logsumexps,
        dtype=dtype,
    )
