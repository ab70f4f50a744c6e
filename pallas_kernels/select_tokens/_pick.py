"""Several programs a row: most candidates are split off, the best picked and looked up."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._end import find_end, read_end
from pallas_kernels._numerics import NO_ID, ordered_bits
from pallas_kernels._row import Row
from pallas_kernels._split import Lists, find_bracket, split
from pallas_kernels.score_tokens._members import find_members
from pallas_kernels.select_tokens._admit import admit, count_rows


class _Candidates:
    """One row's candidates and how many are to be picked."""

    def __init__(self, row: Row, most: int, scored: Any):
        log_mass_ref, starts_ref, budget_ref = scored
        self.row, self.log_mass = row, log_mass_ref
        listed = row.load(starts_ref, jnp.int32(starts_ref.shape[-1] - 1))
        self.total = jnp.minimum(listed, log_mass_ref.shape[-1])
        self.budget = jnp.minimum(jnp.minimum(row.load(budget_ref), self.total), most)

    def load(self, place: Any, exists: Any) -> tuple[Any, Any]:
        keys = ordered_bits(self.row.load(self.log_mass, place, mask=exists))
        return keys, jnp.ones(place.shape, jnp.int32)


def bracket_tokens(*refs: Any, most: int, sample: int, interpret: bool) -> None:
    """Finds a row's bracket and resets its counters.

    Refs:
        log_mass: `[batch, kv_heads, candidates]` float32.
        starts: `Candidates.starts`.
        budget: `[batch, kv_heads]` int32.
        bracket, number: see `find_bracket`, out.
        done: `[batch, kv_heads]` int32, out: zero.
    """
    *operands, bracket_ref, number_ref, done_ref = refs
    row = Row(pl.program_id(1), operands[0].shape[1], None, interpret=interpret)
    x = _Candidates(row, most, operands)
    find_bracket(row, bracket_ref, number_ref, x.load, x.total, x.budget, sample, weighted=False)
    row.store(done_ref, jnp.int32(0))


def split_tokens(*refs: Any, most: int, interpret: bool) -> None:
    """Splits a chunk's candidates, lists those that are left, copies a share of clusters' sizes.

    Refs:
        log_mass, starts, budget: as above.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32.
        layer: int32 scalar.
        bracket, number: from `bracket_tokens`; the latter is written in place.
        keys, places, number, sure: of `_split.Lists`, out.
        left_keys, left_places: `[batch, kv_heads, chunks, chunk]` uint32 and int32, out: what is
            left of each chunk by rising place.
        left: `[batch, kv_heads, chunks]` int32, out: how many are.
        sizes: `[batch, kv_heads, clusters]` int32, out: the clusters' sizes.
    """
    operands, (offsets_ref, layer_ref, bracket_ref) = refs[:3], refs[3:6]
    *listed, left_keys_ref, left_places_ref, left_ref, sizes_ref = refs[7:]
    row = Row(pl.program_id(1), operands[0].shape[1], layer_ref[...], interpret=interpret)
    x = _Candidates(row, most, operands)

    part, (chunks, chunk) = pl.program_id(0), left_keys_ref.shape[-2:]
    keys, places, number, sure = listed
    lists = Lists(keys, places, None, number, sure, None, None)
    found = split(row, part, lists, bracket_ref, x.load, x.total, chunk)
    row.store(left_keys_ref, found.keys, part, found.rank, mask=found.left)
    row.store(left_places_ref, found.places, part, found.rank, mask=found.left)
    row.store(left_ref, found.count, part)

    # Behind the split, whose count would wait for these stores.
    clusters = sizes_ref.shape[-1]
    share = pl.cdiv(clusters, chunks)
    lane = jnp.arange(_pallas.tile(share))
    c = part * share + lane
    exists = (lane < share) & (c < clusters)
    begins = row.load(offsets_ref, c, mask=exists, stacked=True)
    ends = row.load(offsets_ref, c + 1, mask=exists, stacked=True)
    row.store(sizes_ref, ends - begins, c, mask=exists)


def end_tokens(*refs: Any, most: int, tile: int, interpret: bool) -> None:
    """Finds the end of a row's selection.

    Refs:
        log_mass, starts, budget: as above.
        keys, places, number, sure: from `split_tokens`.
        end: of `_split.Lists`, out.
    """
    operands, (keys, places, number, sure, end) = refs[:3], refs[3:]
    row = Row(pl.program_id(1), operands[0].shape[1], None, interpret=interpret)
    x = _Candidates(row, most, operands)

    @pl.when(x.budget > 0)
    def find() -> None:
        lists = Lists(keys, places, None, number, sure, None, end)
        find_end(row, lists, x.load, x.total, x.budget, tile)


def _count_picks(
    row: Row, picked: tuple[Any, Any], clusters_ref: Any, scratch: tuple[Any, Any], remaining: Any
) -> None:
    """Takes a chunk's picks off their clusters' sizes.

    They are in the order of clusters, so a cluster's share is a run. Only the first and the last
    run may go on in other chunks: these are taken off atomically.

    Args:
        row: whose picks.
        picked: int32, the first pick's place in the row's list of them, and how many there are.
        clusters_ref: `Candidates.clusters`.
        scratch: `[batch, kv_heads, max_tokens]` int32, the number in `clusters` of each pick's; and
            `[batch, kv_heads, clusters]` int32, to write to.
        remaining: `[batch, kv_heads, clusters]` int32, the sizes.
    """
    (first, count), (numbers_ref, runs_ref) = picked, scratch
    ends = [row.load(numbers_ref, at) for at in (first, first + count - 1)]

    def look(i: Any, exists: Any, other: Any) -> tuple[Any, Any, Any]:
        """Numbers, which of them lie between the ends, and where their run begins or ends."""
        number = row.load(numbers_ref, first + i, mask=exists)
        within = exists & (number != ends[0]) & (number != ends[1])
        # So there is a pick before and one after it.
        edge = within & (row.load(numbers_ref, first + other, mask=within) != number)
        return number, within, edge

    def mark(i: Any, exists: Any, _: Any) -> None:
        number, _, begins = look(i, exists, i - 1)
        row.store(runs_ref, i, number, mask=begins)

    def subtract(i: Any, exists: Any, totals: Any) -> Any:
        number, _, stops = look(i, exists, i + 1)
        cluster = row.load(clusters_ref, number, mask=stops)
        run = i + 1 - row.load(runs_ref, number, mask=stops)
        left = row.load(remaining, cluster, mask=stops) - run
        row.store(remaining, left, cluster, mask=stops)
        return tuple(
            total + jnp.sum((exists & (number == end)).astype(jnp.int32))
            for total, end in zip(totals, ends, strict=True)
        )

    row.each(count, mark)
    row.barrier()
    totals = row.each(count, subtract, (jnp.int32(0), jnp.int32(0)))
    for i, (end, total) in enumerate(zip(ends, totals, strict=True)):
        cluster = row.load(clusters_ref, end)

        def take_off(total: Any = total, cluster: Any = cluster) -> None:
            row.add(remaining, -total, cluster)

        pl.when((i == 0) | (ends[0] != ends[1]))(take_off)


def pick_tokens(
    *refs: Any,
    chunk: int,
    block: int,
    segment_tokens: int,
    growth_tokens: int,
    cached: bool,
    interpret: bool,
) -> None:
    """Picks a chunk's tokens and looks them up; a row's last program finds slots for the misses.

    `select_tokens` says what the refs are.
    """
    scored, (clusters_ref, granules_ref, offsets_ref, token_ids_ref) = refs[:3], refs[3:7]
    prompt_tokens_ref, layer_ref, step_ref = refs[7:10]
    keys_ref, places_ref, number_ref, sure_ref, end_ref = refs[10:15]
    left_keys_ref, left_places_ref, left_ref = refs[15:18]
    # What comes next is written in place: only the results' refs are used.
    fields = 5 if cached else 2
    refs = refs[20 + fields :]
    tokens_ref, slots_ref, hit_ref, hits_ref, misses_ref, remaining_ref = refs[:6]
    table = refs[6 : 6 + fields]
    done_ref, numbers_ref, runs_ref, chunk_hits_ref, victims_ref = refs[6 + fields :]
    starts_ref, step, chunks = scored[1], step_ref[...], pl.num_programs(0)
    row = Row(
        pl.program_id(1), scored[0].shape[1], layer_ref[...], interpret=interpret, block=block
    )
    part, room = pl.program_id(0), tokens_ref.shape[-1]
    x = _Candidates(row, room, scored)
    budget = x.budget
    prompt = plt.load(prompt_tokens_ref.at[row.b])
    some = (budget > 0) & (part * chunk < x.total)

    @pl.when(some)
    def pick() -> None:
        lists = Lists(keys_ref, places_ref, None, number_ref, sure_ref, None, end_ref)
        end, right = read_end(row, part, lists, x.load, x.total, chunk)

        def of_left(i: Any, exists: Any) -> tuple[Any, Any]:
            return tuple(
                row.load(ref, part, i, mask=exists) for ref in (left_keys_ref, left_places_ref)
            )

        def of_all(i: Any, exists: Any) -> tuple[Any, Any]:
            place = part * chunk + i
            return x.load(place, exists)[0], place

        def look_up(i: Any, exists: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            picked, hits = state
            keys, place = lax.cond(right, lambda: of_left(i, exists), lambda: of_all(i, exists))
            exists = exists & end.selects(keys, place)
            number = exists.astype(jnp.int32)
            at = end.before + picked + jnp.cumsum(number) - 1
            nth, _, position = find_members(
                *(clusters_ref, starts_ref, granules_ref, offsets_ref),
                *(row.layer, row.b, row.h, place, exists),
            )
            row.store(numbers_ref, nth, at, mask=exists)
            in_prompt = lax.div(position, jnp.int32(segment_tokens)) * segment_tokens
            grown = lax.div(position - prompt, jnp.int32(growth_tokens)) * growth_tokens
            start = jnp.where(position < prompt, in_prompt, prompt + grown)
            ids = row.load(token_ids_ref, position, mask=exists, stacked=True)
            token = start + ids.astype(jnp.int32)
            row.store(tokens_ref, token, at, mask=exists)
            if not cached:
                row.store(slots_ref, jnp.full_like(i, NO_ID), at, mask=exists)
                row.store(hit_ref, jnp.zeros(i.shape, bool), at, mask=exists)
                return picked + jnp.sum(number), hits
            slot = row.load(table[0], token, mask=exists, stacked=True)
            hit = exists & (slot >= 0)
            row.store(slots_ref, jnp.where(hit, slot, NO_ID), at, mask=exists)
            row.store(hit_ref, hit, at, mask=exists)
            row.store(table[2], jnp.full_like(i, step), slot, mask=hit, stacked=True)
            return picked + jnp.sum(number), hits + jnp.sum(hit.astype(jnp.int32))

        all_of_chunk = jnp.minimum(x.total - part * chunk, chunk)
        count = jnp.where(right, row.load(left_ref, part), all_of_chunk)
        picked, hits = row.each(count, look_up, (jnp.int32(0), jnp.int32(0)))
        row.store(chunk_hits_ref, hits, part)
        row.barrier()

        @pl.when(picked > 0)
        def count_picks() -> None:
            scratch = numbers_ref, runs_ref
            _count_picks(row, (end.before, picked), clusters_ref, scratch, remaining_ref)

    @pl.when(~some)
    def pick_none() -> None:
        row.store(chunk_hits_ref, jnp.int32(0), part)

    @pl.when(part == 0)
    def fill() -> None:
        def of_block(i: Any, exists: Any, _: Any) -> None:
            at = budget + i
            row.store(tokens_ref, jnp.full_like(at, NO_ID), at, mask=exists)
            row.store(slots_ref, jnp.full_like(at, NO_ID), at, mask=exists)
            row.store(hit_ref, jnp.zeros(at.shape, bool), at, mask=exists)

        row.each(room - budget, of_block)

    # All of this program's stores come before its count, and all the others' before the last one's.
    row.barrier()

    @pl.when(row.add(done_ref, 1) == chunks - 1)
    def finish() -> None:
        nth = jnp.arange(_pallas.tile(chunk_hits_ref.shape[-1]))
        hits = jnp.sum(row.load(chunk_hits_ref, nth, mask=nth < chunk_hits_ref.shape[-1]))
        if cached:
            out = tokens_ref, slots_ref, hit_ref
            admit(row, table, out, victims_ref, (budget, hits), step)
        count_rows(row, table, (hits_ref, misses_ref), (hits, budget - hits))
