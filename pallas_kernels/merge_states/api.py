"""Public function of the op `merge_states`."""

from jaxtyping import Array, Float

from pallas_kernels import _dispatch
from pallas_kernels._dispatch import Implementation
from pallas_kernels.merge_states import reference, triton


def merge_states(
    outputs: Float[Array, "parts batch kv_heads group head_dim"],
    logsumexps: Float[Array, "parts batch kv_heads group"],
    *,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "batch kv_heads group head_dim"],
    Float[Array, "batch kv_heads group"],
]:
    """Merges attention over disjoint sets of tokens into attention over their union.

    Args:
        outputs: float32, each part's softmax-weighted mean of values.
        logsumexps: float32, each part's log of the sum of exponentials; about -1e30 for a part
            with nothing in it, whose output is not read.

    Returns:
        output, logsumexp: float32, of the union; zeros and about -1e30 where all parts are empty.
    """
    return _dispatch.call(
        "merge_states",
        implementation,
        {"xla": reference.merge_states, "triton": triton.merge_states},
        outputs,
        logsumexps,
    )
