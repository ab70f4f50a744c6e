"""A random row cache, and the rows that a step reads from it and from the store."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.rows import is_held
from pallas_kernels.shapes import StepShape
from pallas_kernels.testing._index import shuffle
from pallas_kernels.types import EMPTY, NO_ID, RowTable

# The decode step that the inputs are for: later than any slot's last use.
STEP = 1000


def rows_to_read(
    key: Array,
    shape: StepShape,
    row: tuple[int, ...],
    lengths: Array,
    retrieved: Array,
    miss_share: float | Array,
) -> tuple[RowTable, tuple[Array, Array, Array]]:
    """Draw a full row cache in every layer, and random rows to read, hits in it and misses.

    The lists hold for every layer: all layers' caches hold the same tokens.
    """
    batch, kv_heads = row[1:]
    slots, room = shape.slots, shape.max_retrieved
    places = jnp.broadcast_to(
        jnp.arange(shape.tokens, dtype=jnp.int32), (batch, kv_heads, shape.tokens)
    )
    order = shuffle(key, jnp.where(places < lengths[:, None, None], 0, 1))
    # The n-th token of that order lies in a slot that is anywhere: a stride with no factor of
    # `slots` visits every slot once.
    stride = next(p for p in (7919, 6007, 104729, 1) if slots % p) if slots > 1 else 1
    slot = (jnp.arange(slots, dtype=jnp.uint32) * (stride % slots) % slots).astype(jnp.int32)
    cached = jnp.arange(slots) < lengths[:, None, None]
    used = jnp.where(cached, order[..., :slots], EMPTY)
    owner = jnp.zeros((batch, kv_heads, slots), jnp.int32).at[..., slot].set(used)

    def invert(owner: Array) -> Array:
        places = jnp.where(is_held(owner), owner, NO_ID)
        slots_of = jnp.arange(slots, dtype=jnp.int32)
        return jnp.full(shape.tokens, EMPTY, jnp.int32).at[places].set(slots_of, mode="drop")

    last_used = jnp.where(is_held(owner), jax.random.randint(key, owner.shape, 0, STEP), EMPTY)
    slots_of, owners, uses = (
        jnp.broadcast_to(field, (*row, field.shape[-1]))
        for field in (jax.vmap(jax.vmap(invert))(owner), owner, last_used)
    )
    # One counter about to wrap around.
    hits, misses = (jnp.full(row, count, jnp.uint32) for count in (2**32 - 3, 7))
    table = RowTable(slots_of, owners, uses, hits, misses)

    nth = jnp.arange(room, dtype=jnp.int32)
    count = jnp.minimum(retrieved, room)[:, None, None]
    hits = jnp.minimum(count - jnp.ceil(miss_share * count).astype(jnp.int32), slots)
    hit = jnp.broadcast_to(nth < hits, (batch, kv_heads, room))
    # Misses come from beyond the slots, as far as there are tokens beyond them, and displace the
    # slots after the hits'.
    beyond = jnp.where(lengths[:, None, None] >= slots + count - hits, slots, hits)
    place = jnp.where(hit, nth, beyond + nth - hits)
    tokens = jnp.take_along_axis(order, jnp.minimum(place, shape.tokens - 1), axis=-1)
    listed = jnp.where(nth < slots, slot[jnp.minimum(nth, slots - 1)], NO_ID)
    valid = nth < count
    tokens = jnp.where(valid, tokens, NO_ID)
    slots_read = jnp.where(valid, listed, NO_ID)
    # By segments and in random order in each, as a list by position has them; past the last one
    # there is nothing.
    segment = jnp.where(valid, tokens // shape.segment_tokens, NO_ID)
    mixed = shuffle(key, segment)
    mixed_reads = (
        jnp.take_along_axis(x, mixed, axis=-1) for x in (tokens, slots_read, hit & valid)
    )
    first, second, third = mixed_reads
    return table, (first, second, third)
