"""The op `encode_tokens`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.encode_tokens import reference, triton
from pallas_kernels.encode_tokens.reference import rotate as rotate
from pallas_kernels.encode_tokens.reference import rotation as rotation
from pallas_kernels.types import TokenCodes


def encode_tokens(
    keys: Float[Array, "*rows tokens head_dim"],
    centroids: Float[Array, "*rows tokens head_dim"],
    rotation_matrix: Float[Array, "head_dim head_dim"],
    *,
    implementation: Implementation | None = None,
) -> TokenCodes:
    """Encode each key's residual from its centroid in one bit a dimension.

    With r = R(k - c): the code is sign(r), the scale |r|^2 / |r|_1, so that for a query q
    q.k is estimated without bias by q.c + scale * (Rq . sign(r)) (RaBitQ, arXiv 2405.12497,
    section 3; the scale here folds its 1/<o-bar, o> and |r| into one number).

    Args:
        keys: post-RoPE keys.
        centroids: each token's own centroid, as stored: rounding it changes what is encoded.
        rotation_matrix: R, float32, orthogonal; `rotation(head_dim)`.
        implementation: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "encode_tokens",
        implementation,
        {"xla": reference.encode_tokens, "triton": triton.encode_tokens},
        keys,
        centroids,
        rotation_matrix,
    )
