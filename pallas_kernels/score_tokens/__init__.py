"""The op `score_tokens`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.score_tokens import reference, triton
from pallas_kernels.types import Candidates, ClusterScores, TokenCodes


def score_tokens(
    scores: ClusterScores,
    candidates: Candidates,
    offsets: Int[Array, "layers batch kv_heads edges"],
    codes: TokenCodes | None,
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    max_candidates: int,
    implementation: Implementation | None = None,
) -> Float[Array, "batch kv_heads candidates"]:
    """Estimate the logits of the candidates' tokens from their one-bit codes.

    A token with code `bits` (+-1 a dimension) and scale `a` in a cluster with logit l has the
    estimate l + scale * a * (Rq . bits): RaBitQ's unbiased estimator (arXiv 2405.12497, theorem
    3.2) of its residual's product, added to the centroid's. Its group mass is exp(estimate -
    logsumexp), summed over the query heads that share the kv head.

    Args:
        scores: from `score_clusters`, with the rotated query.
        candidates: from `select_clusters`.
        offsets: as in `score_clusters`.
        codes: from `encode_tokens`, of `[layers, batch, kv_heads]` and in cluster order. None:
            every token has its cluster's logit (the paper's index, which has no codes).
        layer: which layer of the stacks.
        scale: as in `score_clusters`.
        max_candidates: room for candidates a row; tokens past it are left out.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        float32, log of each candidate's group mass by estimate, in the candidates' order; about
        -1e30 past the last one.

    Raises:
        ValueError: the scores have no rotated query.
    """
    return dispatch.call(
        "score_tokens",
        implementation,
        {"xla": reference.score_tokens, "triton": triton.score_tokens},
        scores,
        candidates,
        offsets,
        codes,
        layer,
        scale=scale,
        max_candidates=max_candidates,
    )
