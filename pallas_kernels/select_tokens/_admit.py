"""Finding slots for missed rows: least recently used ones, and the row table's update."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import NO_ID
from pallas_kernels._pairs import list_selected
from pallas_kernels._row import Row

# Slots' ages stay in registers while they are no more than so many blocks. With more, every round
# of the bisection reads them again and waits for each block.
BLOCKS_IN_REGISTERS = 8


def admit(
    row: Row,
    table: tuple[Any, ...],
    out: tuple[Any, Any, Any],
    victims_ref: Any,
    found: tuple[Any, Any, Any],
    step: Any,
) -> None:
    """Gives missed rows the least recently used slots, by rising slot, as far as there are any.

    Args:
        row: whose rows.
        table: `RowTable`'s fields.
        out: `Retrieved`'s tokens, slots and hit, of which the slots of misses are written.
        victims_ref: `[batch, kv_heads, slots]` int32, scratch.
        found: int32 all, the length of the list of rows, how many of it are retrieved, and how
            many of these hit.
        step: int32.
    """
    (listed, count, hits), slots = found, table[1].shape[-1]
    wanted = jnp.minimum(count, slots) - hits
    pl.when(wanted > 0)(lambda: _admit(row, table, out, victims_ref, listed, wanted, step))


def _admit(
    row: Row,
    table: tuple[Any, ...],
    out: tuple[Any, Any, Any],
    victims_ref: Any,
    listed: Any,
    wanted: Any,
    step: Any,
) -> None:
    """`admit` of the first `wanted` missed rows, at least one."""
    slot_of_token_ref, token_of_slot_ref, last_used_ref, *_ = table
    tokens_ref, slots_ref, hit_ref = out
    slots = token_of_slot_ref.shape[-1]

    def age(slot: Any, exists: Any) -> Any:
        # Zero for a slot used in this step; the largest one is an empty slot's, step + 1.
        used = row.load(last_used_ref, slot, mask=exists, stacked=True)
        return jnp.where(exists, step - used, 0).astype(jnp.uint32)

    most = _pallas.tile(slots)
    in_registers = most <= BLOCKS_IN_REGISTERS * row.block
    if in_registers:
        every = jnp.arange(most)
        ages_of_all = age(every, every < slots)

    def held(key: Any) -> Any:
        if in_registers:
            return jnp.sum((ages_of_all >= key).astype(jnp.int32))

        def add(slot: Any, exists: Any, held: Any) -> Any:
            return held + (age(slot, exists) >= key).astype(jnp.int32)

        return jnp.sum(row.each(jnp.int32(slots), add, jnp.zeros(row.block, jnp.int32)))

    key, above = threshold(held, wanted, jnp.uint32(0), (step + 2).astype(jnp.uint32))

    def list_victims(slot: Any, ages: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        given, at, state = list_selected(ages > key, ages == key, wanted - above, state)
        row.store(victims_ref, slot, at, mask=given)
        return state

    none = jnp.int32(0), jnp.int32(0)
    if in_registers:
        list_victims(every, ages_of_all, none)
    else:
        row.each(
            jnp.int32(slots),
            lambda slot, exists, state: list_victims(slot, age(slot, exists), state),
            none,
        )
    row.barrier()

    def enter(i: Any, exists: Any, missed: Any) -> Any:
        token = row.load(tokens_ref, i, mask=exists)
        miss = exists & ~row.load(hit_ref, i, mask=exists) & (token != NO_ID)
        miss = miss.astype(jnp.int32)
        nth = missed + jnp.cumsum(miss) - 1
        enters = (miss > 0) & (nth < wanted)
        victim = row.load(victims_ref, nth, mask=enters)
        evicted = row.load(token_of_slot_ref, victim, mask=enters, stacked=True)
        gone = enters & (evicted >= 0)
        row.store(slot_of_token_ref, jnp.full_like(i, -1), evicted, mask=gone, stacked=True)
        row.store(slot_of_token_ref, victim, token, mask=enters, stacked=True)
        row.store(slots_ref, victim, i, mask=enters)
        # A slot's old owner was read by the lane that now writes its new one.
        row.barrier()
        row.store(token_of_slot_ref, token, victim, mask=enters, stacked=True)
        row.store(last_used_ref, jnp.full_like(i, step), victim, mask=enters, stacked=True)
        return missed + jnp.sum(miss)

    row.each(listed, enter, jnp.int32(0))


def count_rows(
    row: Row, table: tuple[Any, ...], counts: tuple[Any, Any], found: tuple[Any, Any]
) -> None:
    """Writes how many rows hit and missed in this step, and adds them to the table's counters.

    Args:
        row: whose rows.
        table: `RowTable`'s fields, or only its counters.
        counts: `Retrieved`'s hits and misses, written.
        found: int32 both.
    """
    for ref, total_ref, number in zip(counts, table[-2:], found, strict=True):
        row.store(ref, number)
        row.store(
            total_ref, row.load(total_ref, stacked=True) + number.astype(jnp.uint32), stacked=True
        )
