"""The few numeric conventions that all ops share."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.types import MASKED, NO_ID

# exp(x) is 2**(LOG2_E * x), for which GPUs have an instruction.
LOG2_E = math.log2(math.e)


def is_masked(x: Array) -> Array:
    """Say which logits, floats of any shape, stand for nothing: bool; NaN does not."""
    return x <= MASKED / 2


def log_sum_exp(x: Array, axis: int) -> Array:
    """Take log(sum(exp(x))), in float32; MASKED where everything along the axis is masked.

    NaN where anything along the axis is NaN or +inf.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(x, axis=axis, keepdims=True)
    total = jnp.sum(jnp.where(is_masked(x), 0.0, jnp.exp(x - peak)), axis=axis)
    return log_total(jnp.squeeze(peak, axis), total)


def log_total(peak: Array, total: Array) -> Array:
    """Compute the log of a sum taken relative to its peak; MASKED for an empty one, of total 0."""
    empty = total == 0
    return jnp.where(empty, MASKED, peak + jnp.log(jnp.where(empty, 1.0, total)))


def log_count(count: Array) -> Array:
    """Take the log of an integer count, in float32; MASKED for zero."""
    count = count.astype(jnp.float32)
    return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1.0)), MASKED)


def ordered_bits(x: Array) -> Array:
    """Map float32 to uint32, in the same order; -0.0 counts as 0.0, and any NaN as less than -inf.

    No key is 0, which is left for what does not exist, nor 2^32 - 1.
    """
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | (jnp.uint32(1) << 31))
    return jnp.where(x == x, keys, jnp.uint32(1))


def from_ordered_bits(key: Array) -> Array:
    """Return the float32 that `ordered_bits` made the key of; a NaN of NaN's."""
    bits = jnp.where(key >> 31 == 1, key ^ (jnp.uint32(1) << 31), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def heaviest(key: Array, weights: Array, budget: Array) -> Array:
    """Mark the elements of largest key, until their weights reach the budget.

    Exact: in the order of falling key, ties by rising place, the shortest prefix whose weights
    add up to `budget`, or everything that has a weight if all of it is less. By bisection on the
    key's bits: it takes 32 sums and no sort.

    Args:
        key: `[..., n]` uint32; `ordered_bits` makes one of a float.
        weights: `[..., n]` int32, zero for what is not to be marked.
        budget: `[...]` int32.

    Returns:
        `[..., n]` bool.
    """
    budget = budget[..., None]

    def halve(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (31 - i))
        held = jnp.sum(jnp.where(key >= higher, weights, 0), axis=-1, keepdims=True)
        return jnp.where(held >= budget, higher, threshold)

    start = jnp.zeros((*key.shape[:-1], 1), jnp.uint32)
    threshold = lax.fori_loop(0, 32, halve, start)
    above = jnp.where(key > threshold, weights, 0)
    equal = jnp.where(key == threshold, weights, 0)
    held = jnp.sum(above, axis=-1, keepdims=True) + jnp.cumsum(equal, axis=-1) - equal
    return (above > 0) | ((equal > 0) & (held < budget))


def list_places(mark: Array, room: int) -> Array:
    """List where `mark` holds, rising: `[..., n]` bool to `[..., room]` int32, NO_ID after."""
    n = mark.shape[-1]
    place = jnp.where(mark, jnp.cumsum(mark, axis=-1) - 1, NO_ID)

    def of_row(place: Array) -> Array:
        empty = jnp.full((room,), NO_ID, jnp.int32)
        return empty.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")

    for _ in range(mark.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(place)
