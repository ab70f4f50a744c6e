"""Several programs a row: the picked candidates' rows, slots and clusters."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._numerics import NO_ID
from pallas_kernels._row import Row
from pallas_kernels.score_tokens._members import Members, find_members
from pallas_kernels.select_tokens._admit import admit, count_rows
from pallas_kernels.select_tokens._dropped import Dropped, worth_reading
from pallas_kernels.select_tokens._pick import limits

# Slots' ages that a thread looks at at once, when slots are to be found for missed rows.
SLOTS_A_THREAD = 4


def look_up_rows(
    *refs: Any,
    segment_tokens: int,
    growth_tokens: int,
    block: int,
    threads: int,
    cached: bool,
    admission_ratio: float,
    interpret: bool,
) -> None:
    """Looks up a block of a row's picks; the row's last program finds slots for those missed.

    `select_tokens` says what the refs are. At an `admission_ratio` of 1 every pick is retrieved.
    """
    # The first ones are written in place: only the results' refs are used.
    fields, choosy = 5 if cached else 2, admission_ratio > 1
    refs = refs[2 + fields :]
    picked_ref, log_mass_ref, clusters_ref, starts_ref, granules_ref, budget_ref = refs[:6]
    offsets_ref, token_ids_ref, prompt_tokens_ref, layer_ref, step_ref = refs[6:11]
    least_ref = refs[11] if choosy else None
    refs = refs[11 + choosy :]
    tokens_ref, slots_ref, hit_ref, hits_ref, misses_ref = refs[:5]
    remaining_ref, done_ref, table = *refs[5:7], refs[7 : 7 + fields]
    block_hits_ref, victims_ref, *scratch = refs[7 + fields :]
    row = Row(pl.program_id(1), log_mass_ref.shape[1], layer_ref[...], interpret=interpret)
    part, parts = pl.program_id(0), pl.num_programs(0)
    room, step = tokens_ref.shape[-1], step_ref[...]
    _, budget = limits(row, log_mass_ref, starts_ref, budget_ref, room)

    i = part * block + jnp.arange(block)
    exists, valid = i < room, i < budget
    place = row.load(picked_ref, i, mask=valid)
    members = Members(clusters_ref, starts_ref, granules_ref, offsets_ref)
    number, cluster, position = find_members(members, (row.layer, row.b, row.h), place, valid)
    prompt = plt.load(prompt_tokens_ref.at[row.b])
    in_prompt = lax.div(position, jnp.int32(segment_tokens)) * segment_tokens
    grown = lax.div(position - prompt, jnp.int32(growth_tokens)) * growth_tokens
    start = jnp.where(position < prompt, in_prompt, prompt + grown)
    ids = row.load(token_ids_ref, position, mask=valid, stacked=True)
    token = start + ids.astype(jnp.int32)
    hit, slot = jnp.zeros(block, bool), jnp.full_like(i, NO_ID)
    if cached:
        found = row.load(table[0], token, mask=valid, stacked=True)
        hit = valid & (found >= 0)
        slot = jnp.where(hit, found, NO_ID)
        row.store(table[2], jnp.full_like(i, step), found, mask=hit, stacked=True)
    kept, dropped = valid, None
    if choosy:
        mass = row.load(log_mass_ref, place, mask=valid)
        kept = valid & (hit | worth_reading(row, mass, least_ref, table, admission_ratio))
        dropped = Dropped(row, *scratch)
    row.store(tokens_ref, jnp.where(kept, token, NO_ID), i, mask=exists)
    row.store(slots_ref, slot, i, mask=exists)
    row.store(hit_ref, hit, i, mask=exists)
    remaining_refs, picks = (starts_ref, picked_ref, remaining_ref), (i, number, cluster)
    _count_remaining(row, remaining_refs, picks, budget, valid & ~kept, dropped)

    out = tokens_ref, slots_ref, hit_ref
    if not cached:
        pl.when(part == 0)(
            lambda: count_rows(row, table, (hits_ref, misses_ref), (jnp.int32(0), budget))
        )
        return
    row.store(block_hits_ref, jnp.sum(hit.astype(jnp.int32)), part)
    # All of this program's stores come before its count, and all the others' before the last one's.
    row.barrier()

    @pl.when(row.add(done_ref, 1) == parts - 1)
    def finish() -> None:
        nth = jnp.arange(_pallas.tile(block_hits_ref.shape[-1]))
        hits = jnp.sum(row.load(block_hits_ref, nth, mask=nth < block_hits_ref.shape[-1]))
        count = budget if dropped is None else budget - dropped.finish(remaining_ref)
        whole = row.in_blocks(SLOTS_A_THREAD * threads)
        admit(whole, table, out, victims_ref, (budget, count, hits), step)
        count_rows(row, table, (hits_ref, misses_ref), (hits, count - hits))


def _count_remaining(
    row: Row,
    refs: tuple[Any, Any, Any],
    picks: tuple[Any, Any, Any],
    budget: Any,
    left: Any,
    dropped: Dropped | None,
) -> None:
    """Writes what each cluster keeps of which tokens are picked.

    Picks are listed by cluster, so a cluster's are a run. The thread with the first of them
    searches for the last one.

    Args:
        row: whose picks.
        refs: `Candidates.starts`; all picked places; and the clusters' sizes, written.
        picks: int32, each pick's number in the list of picks, its cluster's number in the list of
            candidates, and its cluster.
        budget: int32, how many picks there are.
        left: bool, the picks that are not retrieved.
        dropped: counts these, if there may be any.
    """
    (starts_ref, picked_ref, remaining_ref), (i, number, cluster) = refs, picks
    valid = i < budget
    begins = row.load(starts_ref, number, mask=valid)
    ends = row.load(starts_ref, number + 1, mask=valid)
    before = row.load(picked_ref, i - 1, mask=valid & (i > 0))
    first = valid & ((i == 0) | (before < begins))
    most = jnp.minimum(i + (ends - begins), budget) - 1

    def halve(bounds: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        last, most, width = bounds
        middle = (last + most + 1) >> 1
        within = row.load(picked_ref, middle, mask=first) < ends
        last, most = jnp.where(within, middle, last), jnp.where(within, most, middle - 1)
        return last, most, width >> 1

    width = jnp.max(jnp.where(first, ends - begins, 0))
    last, *_ = lax.while_loop(lambda bounds: bounds[2] > 0, halve, (i, most, width))
    back = 0 if dropped is None else dropped.count(left, picks, first, last)
    row.store(remaining_ref, ends - begins - (last + 1 - i) + back, cluster, mask=first)
