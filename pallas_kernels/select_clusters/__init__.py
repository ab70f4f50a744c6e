"""The op `select_clusters`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.select_clusters import reference, triton
from pallas_kernels.select_clusters.reference import list_candidates as list_candidates
from pallas_kernels.types import Candidates, Reach


def select_clusters(
    logits: Float[Array, "batch kv_heads group clusters"],
    logsumexp: Float[Array, "batch kv_heads group"],
    offsets: Int[Array, "layers batch kv_heads clusters+1"],
    layer: Int[Array, ""] | int,
    budget: Int[Array, " batch"],
    *,
    max_candidates: int,
    reach: Reach | None = None,
    implementation: Implementation | None = None,
) -> Candidates:
    """Select the clusters of most group mass per token, until they hold `budget` tokens.

    Group mass per token: exp(logit - logsumexp), summed over the query heads that share the kv
    head. The order is exact, ties to the lower id; the last cluster taken is the one with which
    the members reach the budget, so the selection holds fewer than budget + the largest cluster's
    size tokens, and fewer than the budget only if it holds all.

    Args:
        logits, logsumexp: float32, from `score_clusters`.
        offsets: int32, as there.
        layer: int32, which layer of `offsets`.
        budget: int32, tokens wanted, for each sequence.
        max_candidates: room for candidates a row, which the ops that read them must have too.
        reach: rank clusters by what their members might reach in place of their means; None: by
            the logits as they are.
        implementation: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "select_clusters",
        implementation,
        {"xla": reference.select_clusters, "triton": triton.select_clusters},
        logits,
        logsumexp,
        offsets,
        layer,
        budget,
        max_candidates=max_candidates,
        reach=reach,
    )
