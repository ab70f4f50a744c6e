"""Several programs a row: the picked candidates' rows, slots and clusters."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.rows import is_held
from pallas_kernels.score_tokens._members import Members, find_members
from pallas_kernels.select_tokens._dropped import Dropped, worth_reading
from pallas_kernels.select_tokens._pick import limits
from pallas_kernels.toolbox.head_view import HeadView
from pallas_kernels.types import NO_ID


class LookUp(NamedTuple):
    """What `look_up_rows` reads and writes; what is written in place is here as it is written.

    Attributes:
        picked: from `pick_rows`.
        log_mass: `[batch, kv_heads, candidates]` float32.
        clusters, starts, granules: the candidates.
        budget: `[batch, kv_heads]` int32.
        offsets, token_ids, prompt_tokens, layer, step: as `select_tokens` has them.
        slot_of_token, missed: of the row table, if there are slots.
        least: from `pick_rows`, if rows may be left out.
        tokens, slots, hit: `Retrieved`'s, out; the slots of hits alone.
        remaining: `[batch, kv_heads, clusters]` int32, the clusters' sizes, in place.
        last_used: of the row table, in place, if there are slots.
        block_hits: `[batch, kv_heads, parts]` int32, out: each program's hits, if there are slots.
        through, blocks: what `Dropped` writes, if rows may be left out.
        members_of: `Retrieved.clusters`, out, if they are asked for.
        misses: `[batch, kv_heads]` int32, out, and
        miss_count: of the row table, in place, if there are no slots: all that is picked is missed.
    """

    picked: Any
    log_mass: Any
    clusters: Any
    starts: Any
    granules: Any
    budget: Any
    offsets: Any
    token_ids: Any
    prompt_tokens: Any
    layer: Any
    step: Any
    slot_of_token: Any
    missed: Any
    least: Any
    tokens: Any
    slots: Any
    hit: Any
    remaining: Any
    last_used: Any
    block_hits: Any
    through: Any
    blocks: Any
    members_of: Any
    misses: Any
    miss_count: Any


def look_up_rows(
    refs: LookUp,
    *,
    segment_tokens: int,
    growth_tokens: int,
    block: int,
    slots: int,
    admission_ratio: float,
    interpret: bool,
) -> None:
    """Look up a block of a row's picks.

    At an `admission_ratio` of 1 every pick is retrieved.
    """
    row = HeadView(pl.program_id(1), refs.log_mass.shape[1], refs.layer[...], interpret=interpret)
    part, room = pl.program_id(0), refs.tokens.shape[-1]
    _, budget = limits(row, refs.starts, refs.budget, (refs.log_mass.shape[-1], room))

    i = part * block + jnp.arange(block)
    exists, valid = i < room, i < budget
    place = row.load(refs.picked, i, mask=valid)
    members = Members(refs.clusters, refs.starts, refs.granules, refs.offsets)
    number, cluster, position = find_members(members, (row.layer, row.b, row.h), place, valid)
    prompt = plt.load(refs.prompt_tokens.at[row.b])
    in_prompt = lax.div(position, jnp.int32(segment_tokens)) * segment_tokens
    grown = lax.div(position - prompt, jnp.int32(growth_tokens)) * growth_tokens
    start = jnp.where(position < prompt, in_prompt, prompt + grown)
    ids = row.load(refs.token_ids, position, mask=valid, stacked=True)
    token = start + ids.astype(jnp.int32)
    hit, slot = jnp.zeros(block, bool), jnp.full_like(i, NO_ID)
    if slots:
        found = row.load(refs.slot_of_token, token, mask=valid, stacked=True)
    # While the slots are on their way.
    runs = _find_runs(row, refs.starts, refs.picked, i, number, budget)
    if slots:
        hit = valid & is_held(found)
        slot = jnp.where(hit, found, NO_ID)
        used = jnp.full_like(i, refs.step[...])
        row.store(refs.last_used, used, found, mask=hit, stacked=True)
        row.store(refs.block_hits, jnp.sum(hit.astype(jnp.int32)), part)
    kept, dropped = valid, None
    if refs.least is not None:
        mass = row.load(refs.log_mass, place, mask=valid)
        filling = row.load(refs.missed, stacked=True) < jnp.uint32(slots)
        worth = worth_reading(row, mass, refs.least, filling, admission_ratio)
        kept = valid & (hit | worth)
        dropped = Dropped(row, refs.through, refs.blocks)
    row.store(refs.tokens, jnp.where(kept, token, NO_ID), i, mask=exists)
    row.store(refs.slots, slot, i, mask=exists)
    row.store(refs.hit, hit, i, mask=exists)
    if refs.members_of is not None:
        row.store(refs.members_of, jnp.where(kept, cluster, NO_ID), i, mask=exists)
    first, last, size = runs
    back: Any = 0
    if dropped is not None:
        back = dropped.count(valid & ~kept, (i, number, cluster), first, last)
    row.store(refs.remaining, size - (last + 1 - i) + back, cluster, mask=first)
    if not slots:
        pl.when(part == 0)(lambda: count(row, refs.misses, refs.miss_count, budget))


def count(row: HeadView, number_ref: Any, total_ref: Any, number: Any) -> None:
    """Write how many of a row's rows hit or missed, and adds it to the row table's counter."""
    row.store(number_ref, number)
    total = row.load(total_ref, stacked=True) + number.astype(jnp.uint32)
    row.store(total_ref, total, stacked=True)


def _find_runs(
    row: HeadView, starts_ref: Any, picked_ref: Any, i: Any, number: Any, budget: Any
) -> tuple[Any, Any, Any]:
    """Where the picks of a cluster end: they are listed by cluster, so a cluster's are a run.

    The thread with the first of them searches for the last one.

    Args:
        row: whose picks.
        starts_ref: `Candidates.starts`.
        picked_ref: all picked places.
        i, number: int32, each pick's number in the list of picks, and its cluster's number in the
            list of candidates.
        budget: int32, how many picks there are.

    Returns:
        first: bool, which picks are their clusters' first ones; and where they are
        last: int32, the number of the cluster's last pick,
        size: int32, the cluster's tokens.
    """
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
    return first, last, ends - begins
