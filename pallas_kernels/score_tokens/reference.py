"""The semantics of `score_tokens`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.encode_tokens.reference import unpack_signs
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import MASKED, NO_ID, Candidates, ClusterScores, PackedQuery, TokenCodes


def list_members(
    candidates: Candidates, offsets: Array, max_candidates: int
) -> tuple[Array, Array]:
    """List the candidates' tokens by rising index position.

    Args:
        candidates: from `select_clusters`.
        offsets: `[batch, kv_heads, clusters + 1]` int32.
        max_candidates: length of the list.

    Returns:
        positions, clusters: `[batch, kv_heads, max_candidates]` int32; NO_ID past the last token.
    """
    place = jnp.arange(max_candidates, dtype=jnp.int32)

    def of_row(clusters: Array, starts: Array, offsets: Array) -> tuple[Array, Array]:
        # Each cluster's number in the list at its first place, carried on to its last one.
        numbers = jnp.arange(clusters.shape[0], dtype=jnp.int32)
        first = jnp.where(clusters != NO_ID, starts[:-1], NO_ID)
        nth = jnp.zeros(max_candidates, jnp.int32).at[first].set(numbers, mode="drop")
        nth = lax.cummax(nth)
        cluster = clusters[nth]
        position = offsets[jnp.minimum(cluster, clusters.shape[0] - 1)] + place - starts[nth]
        valid = place < starts[-1]
        return jnp.where(valid, position, NO_ID), jnp.where(valid, cluster, NO_ID)

    return jax.vmap(jax.vmap(of_row))(candidates.clusters, candidates.starts, offsets)


def query_of(scores: ClusterScores) -> Array | PackedQuery:
    """Return the rotated query.

    Raises:
        ValueError: there is none.
    """
    if scores.rotated is None:
        raise ValueError(
            "score_tokens: the scores have no rotated query; call score_clusters with rotated=True"
        )
    return scores.rotated


def score_tokens(
    scores: ClusterScores,
    candidates: Candidates,
    offsets: Array,
    codes: TokenCodes | None,
    layer: Array | int,
    *,
    scale: float,
    max_candidates: int,
) -> Array:
    """See `pallas_kernels.score_tokens`.

    Raises:
        NotImplementedError: for a packed query.
    """
    logits, logsumexp, *_ = scores
    rotated_query = query_of(scores)
    if isinstance(rotated_query, PackedQuery):
        raise NotImplementedError("score_tokens: in plain JAX the query is not packed; rotate it")
    batch, kv_heads, _, num_clusters = logits.shape
    positions, clusters = list_members(candidates, offsets[layer], max_candidates)
    safe_cluster = jnp.minimum(clusters, num_clusters - 1)
    estimate = jnp.take_along_axis(logits, safe_cluster[:, :, None, :], axis=-1)
    if codes is not None:
        b = jnp.arange(batch)[:, None, None]
        h = jnp.arange(kv_heads)[None, :, None]
        safe = jnp.minimum(positions, codes.codes.shape[3] - 1)
        signs = unpack_signs(codes.codes[layer, b, h, safe], rotated_query.shape[-1])
        a = codes.scales[layer, b, h, safe].astype(jnp.float32)
        product = jnp.einsum(
            "bhgd,bhmd->bhgm", rotated_query.astype(jnp.float32), signs.astype(jnp.float32)
        )
        estimate = estimate + scale * a[:, :, None, :] * product
    log_mass = log_sum_exp(estimate - logsumexp[..., None], axis=2)
    return jnp.where(clusters != NO_ID, log_mass, MASKED)
