"""The semantics of `score_clusters`, in plain JAX."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.encode_tokens.reference import rotate
from pallas_kernels.numerics import MASKED, log_count, log_sum_exp
from pallas_kernels.score_tokens._query import PackedQuery


class ClusterScores(NamedTuple):
    """What a query makes of every cluster.

    Attributes:
        logits: `[batch, kv_heads, group, clusters]` float32, scale * q.c; about -1e30 for a
            cluster without members.
        logsumexp: `[batch, kv_heads, group]` float32, log of the sum over clusters of
            size * exp(logit): what normalises one query head's masses. About -1e30 where there
            are no clusters.
        rotated: the query as `score_tokens` takes it; None if it was not asked for.
    """

    logits: Array
    logsumexp: Array
    rotated: Array | PackedQuery | None = None


def score_clusters(
    query: Array,
    centroids: Array,
    offsets: Array,
    layer: Array | int,
    *,
    scale: float,
    rotated: bool = False,
) -> ClusterScores:
    """See `pallas_kernels.score_clusters`."""
    sizes = jnp.diff(offsets[layer], axis=-1)[:, :, None, :]
    logits = scale * jnp.einsum(
        "bhgd,bhcd->bhgc", query, centroids[layer], preferred_element_type=jnp.float32
    )
    logits = jnp.where(sizes > 0, logits, MASKED)
    logsumexp = log_sum_exp(logits + log_count(sizes), axis=-1)
    return ClusterScores(logits, logsumexp, rotate(query) if rotated else None)
