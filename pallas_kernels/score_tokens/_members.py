"""Finding the candidates' tokens inside a kernel."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas

# A binary search by single lanes waits for as many loads as it has rounds. So the range is first
# narrowed by two loads of many starts at once.
COARSE = 64


def _last_start(starts_ref: Any, b: Any, h: Any, place: Any) -> Any:
    """The last i with starts[i] <= place, for one place in the list."""
    starts = starts_ref.shape[-1]
    coarse = jnp.arange(_pallas.tile(pl.cdiv(starts, COARSE))) * COARSE
    found = plt.load(starts_ref.at[b, h, coarse], mask=coarse < starts, other=2**31 - 1)
    first = (jnp.sum((found <= place).astype(jnp.int32)) - 1) * COARSE
    fine = first + jnp.arange(COARSE)
    found = plt.load(starts_ref.at[b, h, fine], mask=fine < starts, other=2**31 - 1)
    return first + jnp.sum((found <= place).astype(jnp.int32)) - 1


def find_members(
    clusters_ref: Any,
    starts_ref: Any,
    offsets_ref: Any,
    layer: Any,
    b: Any,
    h: Any,
    place: Any,
    valid: Any,
) -> tuple[Any, Any]:
    """The clusters and index positions of places in a row's list of candidates.

    Args:
        clusters_ref, starts_ref: `Candidates`' fields.
        offsets_ref: `[layers, batch, kv_heads, clusters + 1]`.
        place: `[n]` int32, rising.
        valid: `[n]` bool, the places that are in the list; at least one.

    Returns:
        cluster, position: `[n]` int32; of no meaning where not valid.
    """
    low = _last_start(starts_ref, b, h, jnp.min(jnp.where(valid, place, 2**31 - 1)))
    high = _last_start(starts_ref, b, h, jnp.max(jnp.where(valid, place, 0)))

    def halve(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        span, first, last = state
        middle = (first + last + 1) >> 1
        start = plt.load(starts_ref.at[b, h, middle], mask=valid, other=0)
        right = start <= place
        return span >> 1, jnp.where(right, middle, first), jnp.where(right, last, middle - 1)

    bounds = jnp.full(place.shape, low, jnp.int32), jnp.full(place.shape, high, jnp.int32)
    _, nth, _ = lax.while_loop(lambda state: state[0] > 0, halve, (high - low, *bounds))
    cluster = plt.load(clusters_ref.at[b, h, nth], mask=valid, other=0)
    member = place - plt.load(starts_ref.at[b, h, nth], mask=valid, other=0)
    return cluster, plt.load(offsets_ref.at[layer, b, h, cluster], mask=valid, other=0) + member
