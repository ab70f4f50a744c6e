"""The op `build_clusters`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.build_clusters import reference, triton
from pallas_kernels.build_clusters.reference import capacity as capacity
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import Clusters


def build_clusters(
    keys: Float[Array, "*rows tokens head_dim"],
    values: Float[Array, "*rows tokens head_dim"],
    count: Int[Array, "*#rows"] | int,
    *,
    cluster_size: Int[Array, "*#rows"] | int,
    max_cluster_size: Int[Array, "*#rows"] | int,
    iterations: int,
    least_sizes: tuple[int, int] | None = None,
    implementation: Implementation | None = None,
) -> Clusters:
    """Clusters segments' tokens by their keys (RetroInfer, section 4.3), each row by itself.

    Spherical k-means on keys centred by their mean: ceil(count / cluster_size) centroids that
    start as keys at uniform midpoints, assignment by inner product, ties to the lower id.
    Clusters of more than `max_cluster_size` tokens are cut into even pieces along their main
    direction; empty ones are dropped. The same input gives the same bits, run after run.

    A token whose key holds NaN or infinity is clustered as if its key were the mean. It is in a
    cluster like all others, and makes that cluster's centroid NaN.

    Args:
        keys: post-RoPE keys of a segment a row, such as `[segments, kv_heads, tokens, head_dim]`;
            anything past `count`. Plain JAX takes the rows of the last axis at once, one group of
            them after another; the kernels take all.
        values: likewise.
        count: how many tokens the segments have: one number, or an array that broadcasts to `rows`.
        cluster_size: mean tokens a cluster, before cutting; one number, or one for each row.
        max_cluster_size: most tokens a cluster; likewise.
        iterations: of k-means, before the last assignment.
        least_sizes: where both sizes are arrays, what they are at least: these make the room.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        Clusters, with room for `build_clusters.capacity(tokens, *least_sizes)` of them.

    Raises:
        ValueError: the sizes are arrays, and `least_sizes` is not given.
    """
    return dispatch.call(
        "build_clusters",
        implementation,
        {"xla": reference.build_clusters, "triton": triton.build_clusters},
        keys,
        values,
        count,
        cluster_size=cluster_size,
        max_cluster_size=max_cluster_size,
        iterations=iterations,
        least_sizes=least_sizes,
    )
