"""The op `score_clusters`. Its meaning is `reference.py`; the other files are kernels."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.score_clusters import mosaic_gpu, reference, tpu, triton
from pallas_kernels.types import ClusterScores


def score_clusters(
    query: Float[Array, "batch kv_heads group head_dim"],
    centroids: Float[Array, "layers batch kv_heads clusters head_dim"],
    offsets: Int[Array, "layers batch kv_heads clusters+1"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    rotated: bool = False,
    directions: Float[Array, "layers batch kv_heads clusters rank head_dim"]
    | Int[Array, "layers batch kv_heads clusters rank head_dim"]
    | None = None,
    covariance: Float[Array, "layers batch kv_heads 2 head_dim head_dim"] | None = None,
    implementation: Implementation | None = None,
) -> ClusterScores:
    """Scores every cluster's centroid for every query head (RetroInfer, section 4.2).

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        centroids: plain means of the clusters' keys.
        offsets: cluster j holds the index positions offsets[j] to offsets[j + 1]; clusters not in
            use have none.
        layer: which layer of the stacks.
        scale: multiplies every product; 1/sqrt(head_dim) for most models.
        rotated: rotate the query too, as `score_tokens` wants it. On a GPU that takes no time of
            its own: programs of the same kernel do it beside the others.
        directions: of the clusters' moments, to multiply the query with too; None without.
        covariance: two matrices of each head, likewise; of the centroids' dtype.
        implementation: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "score_clusters",
        implementation,
        {
            "xla": reference.score_clusters,
            "triton": triton.score_clusters,
            "tpu": tpu.score_clusters,
            "mosaic_gpu": mosaic_gpu.score_clusters,
        },
        query,
        centroids,
        offsets,
        layer,
        scale=scale,
        rotated=rotated,
        directions=directions,
        covariance=covariance,
    )
