"""The semantics of `select_clusters`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.numerics import heaviest, list_places, log_sum_exp, ordered_bits
from pallas_kernels.types import GRANULE, MASKED, NO_ID, Candidates, Reach


def list_candidates(selected: Array, sizes: Array, max_candidates: int) -> Candidates:
    """List the candidates that the selected clusters make.

    Args:
        selected, sizes: `[batch, kv_heads, clusters]`, bool and int32.
        max_candidates: room for candidates a row.
    """
    clusters = list_places(selected, selected.shape[-1])
    safe = jnp.minimum(clusters, sizes.shape[-1] - 1)
    held = jnp.where(clusters != NO_ID, jnp.take_along_axis(sizes, safe, axis=-1), 0)
    ends = jnp.cumsum(held, axis=-1, dtype=jnp.int32)
    starts = jnp.concatenate([ends[..., :1] * 0, ends], axis=-1)
    place = jnp.arange(0, max_candidates, GRANULE, dtype=jnp.int32)
    place = jnp.minimum(place, jnp.maximum(ends[..., -1:] - 1, 0))
    find = jax.vmap(jax.vmap(lambda ends, place: jnp.searchsorted(ends, place, side="right")))
    # An empty list's search ends past its end.
    granules = jnp.minimum(find(ends, place), selected.shape[-1] - 1).astype(jnp.int32)
    granules = jnp.where(ends[..., -1:] > 0, granules, 0)
    return Candidates(selected, clusters, starts, granules)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
    max_candidates: int,
    reach: Reach | None = None,
) -> Candidates:
    """See `pallas_kernels.select_clusters`."""
    if reach is not None:
        deviations = reach.deviations[layer].astype(jnp.float32)
        logits = logits + reach.lengths[..., None] * deviations[:, :, None]
    sizes = jnp.diff(offsets[layer], axis=-1)
    mass = jnp.where(sizes > 0, log_sum_exp(logits - logsumexp[..., None], axis=2), MASKED)
    row_budget = jnp.broadcast_to(budget[:, None], mass.shape[:2])
    selected = heaviest(ordered_bits(mass), sizes, row_budget)
    return list_candidates(selected, sizes, max_candidates)
