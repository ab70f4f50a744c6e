"""The op `build_moments`. Its meaning is in `reference.py`; its kernel is in `triton.py`."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.build_moments import reference, triton
from pallas_kernels.build_moments.reference import in_int8 as in_int8
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import Clusters, Moments


def build_moments(
    keys: Float[Array, "*rows tokens head_dim"],
    values: Float[Array, "*rows tokens head_dim"],
    clusters: Clusters,
    *,
    rank: int,
    implementation: Implementation | None = None,
) -> Moments:
    """Find the directions of keys along which the values of each cluster's members vary most.

    With the residuals d of a cluster's keys and e of its values from their means, C = mean(e d')
    and S = mean(d d'): the directions span the first `rank` right singular vectors of C, by
    subspace iteration in float32 from a fixed start. Within that span they are the eigenvectors of
    S, so that the sum of lambda p^2 is all that S holds of the span. The weights are C times the
    directions. Directions that C leaves open are those of S, or zero.

    The metric is the identity: another one, of the queries, was no better (algorithm's notes,
    docs/bounds.md). The same input gives the same bits, run after run.

    A cluster with a member that is not finite has moments of NaN; one of one member, zeros.

    Args:
        keys: post-RoPE keys of a segment a row, as `build_clusters` took them.
        values: likewise.
        clusters: what it made of them, in float32.
        rank: how many directions, from 1 to head_dim.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        Moments in float32, with room for as many clusters as given; `in_int8` makes 8 bits of them.

    Raises:
        ValueError: the rank is out of its range.
    """
    if not 1 <= rank <= keys.shape[-1]:
        raise ValueError(f"build_moments: rank is {rank}; it must be from 1 to {keys.shape[-1]}")
    return dispatch.call(
        "build_moments",
        implementation,
        {"xla": reference.build_moments, "triton": triton.build_moments},
        keys,
        values,
        clusters,
        rank=rank,
    )
