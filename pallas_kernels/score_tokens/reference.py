"""The semantics of `score_tokens`, in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._numerics import MASKED, NO_ID, log_sum_exp
from pallas_kernels.encode_tokens.reference import unpack_signs


class TokenScores(NamedTuple):
    """The candidates' tokens, in the order of their index positions.

    Attributes:
        log_mass: `[batch, kv_heads, candidates]` float32, log of the group mass by estimate; about
            -1e30 past the last candidate.
        positions: `[batch, kv_heads, candidates]` int32, index positions (cluster order); NO_ID
            past the last candidate.
        clusters: `[batch, kv_heads, candidates]` int32, the cluster of each; NO_ID likewise.
    """

    log_mass: Array
    positions: Array
    clusters: Array


def list_members(selected: Array, offsets: Array, max_candidates: int) -> tuple[Array, Array]:
    """Lists the members of the selected clusters by rising index position.

    Args:
        selected: `[..., clusters]` bool.
        offsets: `[..., clusters + 1]` int32.
        max_candidates: length of the list.

    Returns:
        positions, clusters: `[..., max_candidates]` int32; NO_ID past the last member.
    """
    sizes = jnp.where(selected, jnp.diff(offsets, axis=-1), 0)
    ends = jnp.cumsum(sizes, axis=-1)
    starts = jnp.where(sizes > 0, ends - sizes, NO_ID)
    place = jnp.arange(max_candidates, dtype=jnp.int32)

    def of_row(starts: Array, offsets: Array, total: Array) -> tuple[Array, Array]:
        # Each cluster's number at its first place, carried on to its last one.
        numbers = jnp.arange(starts.shape[0], dtype=jnp.int32)
        cluster = jnp.zeros(max_candidates, jnp.int32).at[starts].set(numbers, mode="drop")
        cluster = lax.cummax(cluster)
        position = offsets[cluster] + place - starts[cluster]
        valid = place < total
        return jnp.where(valid, position, NO_ID), jnp.where(valid, cluster, NO_ID)

    for _ in range(ends.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(starts, offsets, ends[..., -1])


def score_tokens(
    rotated_query: Array,
    logits: Array,
    logsumexp: Array,
    selected: Array,
    offsets: Array,
    codes: Array | None,
    scales: Array | None,
    layer: Array | int,
    *,
    scale: float,
    max_candidates: int,
) -> TokenScores:
    """See `pallas_kernels.score_tokens`."""
    batch, kv_heads, _, num_clusters = logits.shape
    positions, clusters = list_members(selected, offsets[layer], max_candidates)
    safe_cluster = jnp.minimum(clusters, num_clusters - 1)
    estimate = jnp.take_along_axis(logits, safe_cluster[:, :, None, :], axis=-1)
    if codes is not None and scales is not None:
        b = jnp.arange(batch)[:, None, None]
        h = jnp.arange(kv_heads)[None, :, None]
        safe = jnp.minimum(positions, codes.shape[3] - 1)
        signs = unpack_signs(codes[layer, b, h, safe], rotated_query.shape[-1])
        a = scales[layer, b, h, safe].astype(jnp.float32)
        product = jnp.einsum(
            "bhgd,bhmd->bhgm", rotated_query.astype(jnp.float32), signs.astype(jnp.float32)
        )
        estimate = estimate + scale * a[:, :, None, :] * product
    log_mass = log_sum_exp(estimate - logsumexp[..., None], axis=2)
    return TokenScores(jnp.where(clusters != NO_ID, log_mass, MASKED), positions, clusters)
