"""One program a row: the least recently used slots for missed rows, and the row table's update."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.rows import is_held
from pallas_kernels.select_tokens._dropped import Dropped
from pallas_kernels.select_tokens._look_up import count
from pallas_kernels.select_tokens._pick import limits
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.bisection import threshold
from pallas_kernels.toolbox.head_view import HeadView
from pallas_kernels.toolbox.packed_counts import list_selected
from pallas_kernels.types import EMPTY, NO_ID

# Slots' ages that a thread looks at at once.
SLOTS_A_THREAD = 4

# Slots' ages stay in registers while they are no more than so many blocks. With more, every round
# of the bisection reads them again and waits for each block.
BLOCKS_IN_REGISTERS = 8


class Admit(NamedTuple):
    """What `admit_rows` reads and writes; what is written in place is here as it is written.

    Attributes:
        tokens, hit, block_hits: from `look_up_rows`.
        starts: `Candidates.starts`.
        budget: `[batch, kv_heads]` int32.
        layer, step: as `select_tokens` has them.
        blocks: what `Dropped` wrote, if rows may be left out.
        hits, misses: `[batch, kv_heads]` int32, out.
        victims: `[batch, kv_heads, slots]` int32, scratch.
        slots: `Retrieved`'s, in place: those of misses are added.
        slot_of_token, token_of_slot, last_used, hit_count, miss_count: the row table, in place.
        remaining: from `look_up_rows`, in place, if rows may be left out.
    """

    tokens: Any
    hit: Any
    block_hits: Any
    starts: Any
    budget: Any
    layer: Any
    step: Any
    blocks: Any
    hits: Any
    misses: Any
    victims: Any
    slots: Any
    slot_of_token: Any
    token_of_slot: Any
    last_used: Any
    hit_count: Any
    miss_count: Any
    remaining: Any


def admit_rows(refs: Admit, *, candidates: int, threads: int, interpret: bool) -> None:
    """Give a row's missed rows the least recently used slots, by rising slot, if there are any.

    Args:
        refs: see there.
        candidates: room for candidates, a row.
        threads: of the program.
        interpret: whether the kernel is interpreted.
    """
    row = HeadView(
        pl.program_id(1),
        *(refs.tokens.shape[1], refs.layer[...]),
        interpret=interpret,
        block=SLOTS_A_THREAD * threads,
    )
    nth = jnp.arange(launch.tile(refs.block_hits.shape[-1]))
    hits = jnp.sum(row.load(refs.block_hits, nth, mask=nth < refs.block_hits.shape[-1]))
    _, listed = limits(row, refs.starts, refs.budget, (candidates, refs.tokens.shape[-1]))
    retrieved = listed
    if refs.blocks is not None:
        retrieved = listed - Dropped(row, None, refs.blocks).finish(refs.remaining)
    wanted = jnp.minimum(retrieved, refs.token_of_slot.shape[-1]) - hits
    pl.when(wanted > 0)(lambda: _admit(row, refs, listed, wanted, refs.step[...]))
    count(row, refs.hits, refs.hit_count, hits)
    count(row, refs.misses, refs.miss_count, retrieved - hits)


def _admit(row: HeadView, refs: Admit, listed: Any, wanted: Any, step: Any) -> None:
    """Give the first `wanted` missed rows, at least one, of so many listed ones their slots."""
    slots = refs.token_of_slot.shape[-1]

    def age(slot: Any, exists: Any) -> Any:
        # Zero for a slot used in this step; the largest one is an EMPTY slot's, step + 1.
        used = row.load(refs.last_used, slot, mask=exists, stacked=True)
        return jnp.where(exists, step - used, 0).astype(jnp.uint32)

    most = launch.tile(slots)
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
        row.store(refs.victims, slot, at, mask=given)
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
        token = row.load(refs.tokens, i, mask=exists)
        miss = exists & ~row.load(refs.hit, i, mask=exists) & (token != NO_ID)
        miss = miss.astype(jnp.int32)
        nth = missed + jnp.cumsum(miss) - 1
        enters = (miss > 0) & (nth < wanted)
        victim = row.load(refs.victims, nth, mask=enters)
        evicted = row.load(refs.token_of_slot, victim, mask=enters, stacked=True)
        gone = enters & is_held(evicted)
        row.store(refs.slot_of_token, jnp.full_like(i, EMPTY), evicted, mask=gone, stacked=True)
        row.store(refs.slot_of_token, victim, token, mask=enters, stacked=True)
        row.store(refs.slots, victim, i, mask=enters)
        # A slot's old owner was read by the lane that now writes its new one.
        row.barrier()
        row.store(refs.token_of_slot, token, victim, mask=enters, stacked=True)
        row.store(refs.last_used, jnp.full_like(i, step), victim, mask=enters, stacked=True)
        return missed + jnp.sum(miss)

    row.each(listed, enter, jnp.int32(0))
