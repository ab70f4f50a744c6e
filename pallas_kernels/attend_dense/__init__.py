"""The op `attend_dense`. Its meaning is `reference.py`; the other files are kernels."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attend_dense import mosaic_gpu, reference, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import Rows


def attend_dense(
    query: Float[Array, "batch kv_heads group head_dim"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, " batch"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "batch kv_heads group head_dim"],
    Float[Array, "batch kv_heads group"],
]:
    """Full attention of one decode step: every query to all of its sequence's tokens.

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        keys, values: of all layers, `[layers, batch, kv_heads, tokens, head_dim]`; of "scaled" ones
            the levels, and `[layers, batch, kv_heads, tokens]` scales, stand for the numbers that
            `rounding.dequantise` makes of them. What lies past a sequence's length is not attended
            to and may be anything, NaN included, scales too.
        lengths: int32, how many tokens each sequence attends to, the first ones; none for 0 or
            less, all for more than there are.
        layer: which layer of the stacks.
        scale: multiplies every product; 1/sqrt(head_dim) for most models.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        output, logsumexp: float32, the softmax-weighted mean of the values and the log of the sum
        of exponentials; zeros and about -1e30 for a sequence of length 0. `merge_states` merges
        them with attention to other tokens.
    """
    return dispatch.call(
        "attend_dense",
        implementation,
        {
            "xla": reference.attend_dense,
            "triton": triton.attend_dense,
            "mosaic_gpu": mosaic_gpu.attend_dense,
        },
        query,
        keys,
        values,
        lengths,
        layer,
        # On an H200 0.90 to 0.93 times as long as Triton's, by the heuristics of both.
        on_hopper="mosaic_gpu",
        scale=scale,
    )
