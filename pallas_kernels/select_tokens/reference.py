"""The semantics of `select_tokens`, in plain JAX."""

import math

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.numerics import heaviest, list_places, ordered_bits
from pallas_kernels.rows import is_held
from pallas_kernels.score_tokens.reference import list_members
from pallas_kernels.types import (
    EMPTY,
    NO_ID,
    IndexedTokens,
    RankedTokens,
    Retrieved,
    RowTable,
    SelectionSettings,
)


def pick_positions(
    ranked: RankedTokens, offsets: Array, max_tokens: int
) -> tuple[Array, Array, Array]:
    """Keep the `budget` candidates of most mass, ties to the lower position, in list order.

    Returns:
        positions, clusters: `[batch, kv_heads, max_tokens]` int32; NO_ID past the last one.
        log_mass: theirs, infinite past the last one.
    """
    log_mass, candidates, budget = ranked
    positions, clusters = list_members(candidates, offsets, log_mass.shape[-1])
    candidate = (positions != NO_ID).astype(jnp.int32)
    picked = heaviest(ordered_bits(log_mass), candidate, row_budgets(budget, candidate.shape[1]))
    source = list_places(picked, max_tokens)
    found = source != NO_ID
    source = jnp.minimum(source, candidate.shape[-1] - 1)

    def take(x: Array) -> Array:
        return jnp.where(found, jnp.take_along_axis(x, source, axis=-1), NO_ID)

    masses = jnp.take_along_axis(log_mass, source, axis=-1)
    return take(positions), take(clusters), jnp.where(found, masses, jnp.inf)


def row_budgets(budget: Array, kv_heads: int) -> Array:
    """`[batch, kv_heads]` int32, of a budget for each sequence or for each row."""
    rows = budget if budget.ndim == 2 else budget[:, None]
    return jnp.broadcast_to(rows, (budget.shape[0], kv_heads)).astype(jnp.int32)


def empty_table(row: tuple[int, int, int], tokens: int, slots: int) -> RowTable:
    """Make a table of empty slots; no array stands in it twice.

    Args:
        row: layers, batch and kv_heads.
        tokens, slots: room for them; without slots the table has no tokens either.
    """
    return RowTable(
        slot_of_token=jnp.full((*row, tokens if slots else 0), EMPTY, jnp.int32),
        token_of_slot=jnp.full((*row, slots), EMPTY, jnp.int32),
        last_used=jnp.full((*row, slots), EMPTY, jnp.int32),
        hits=jnp.zeros(row, jnp.uint32),
        misses=jnp.zeros(row, jnp.uint32),
    )


def look_up(
    tokens: Array, table: RowTable, layer: Array | int, step: Array
) -> tuple[Array, Array, RowTable]:
    """Find the rows' slots, gives missed rows the least recently used ones, updates the table.

    Slots that hold a row of this very selection are never given away. The slots that are go to the
    missed rows in list order, by rising slot; once they run out, the rest stay uncached.
    """
    batch, kv_heads, _ = tokens.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    valid = tokens != NO_ID
    capacity, num_slots = table.slot_of_token.shape[-1], table.token_of_slot.shape[-1]
    if not num_slots:
        misses = table.misses.at[layer].add(jnp.sum(valid, axis=-1, dtype=jnp.uint32))
        none = jnp.full_like(tokens, NO_ID)
        return none, jnp.zeros_like(valid), table._replace(misses=misses)
    # Slots are read and written a layer at a time: XLA updates the stacks in place only where what
    # it writes depends on all that it reads.
    owner, last_used = table.token_of_slot[layer], table.last_used[layer]
    found = table.slot_of_token[layer, b, h, jnp.minimum(tokens, capacity - 1)]
    hit = valid & is_held(found)
    last_used = last_used.at[b, h, jnp.where(hit, found, NO_ID)].set(step, mode="drop")

    miss = valid & ~hit
    free = num_slots - jnp.sum(hit, axis=-1, dtype=jnp.int32)
    wanted = jnp.minimum(jnp.sum(miss, axis=-1, dtype=jnp.int32), free)
    # Used before this step, so not hit in it; EMPTY is the longest ago.
    idle = (last_used < step).astype(jnp.int32)
    age = ~lax.bitcast_convert_type(last_used + 1, jnp.uint32)
    victims = list_places(heaviest(age, idle, wanted), num_slots)
    nth_miss = jnp.cumsum(miss, axis=-1) - 1
    victim = jnp.take_along_axis(victims, jnp.clip(nth_miss, 0, num_slots - 1), axis=-1)
    admitted = miss & (nth_miss < wanted[..., None])
    filled = jnp.where(admitted, victim, NO_ID)

    evicted = jnp.take_along_axis(owner, jnp.clip(victim, 0, num_slots - 1), axis=-1)
    evicted = jnp.where(admitted & is_held(evicted), evicted, NO_ID)
    entering = jnp.where(admitted, tokens, NO_ID)
    slot_of_token = table.slot_of_token.at[layer, b, h, evicted].set(EMPTY, mode="drop")
    slot_of_token = slot_of_token.at[layer, b, h, entering].set(filled, mode="drop")
    owner = owner.at[b, h, filled].set(tokens, mode="drop")
    last_used = last_used.at[b, h, filled].set(step, mode="drop")
    table = RowTable(
        slot_of_token,
        table.token_of_slot.at[layer].set(owner),
        table.last_used.at[layer].set(last_used),
        table.hits.at[layer].add(jnp.sum(hit, axis=-1, dtype=jnp.uint32)),
        table.misses.at[layer].add(jnp.sum(miss, axis=-1, dtype=jnp.uint32)),
    )
    return jnp.where(hit, found, filled), hit, table


def worth_reading(
    tokens: Array,
    log_mass: Array,
    table: RowTable,
    layer: Array | int,
    admission_ratio: float,
) -> Array:
    """Which rows to read: those that are cached, and others that weigh enough.

    Args:
        tokens: `[batch, kv_heads, budget]` int32, NO_ID for none.
        log_mass: theirs, infinite for none.
        table: before the step. Until its slots have all been given away, every row is read.
        layer: which layer.
        admission_ratio: see `pallas_kernels.select_tokens`.
    """
    batch, kv_heads, _ = tokens.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    capacity, num_slots = table.slot_of_token.shape[-1], table.token_of_slot.shape[-1]
    cached = is_held(table.slot_of_token[layer, b, h, jnp.minimum(tokens, capacity - 1)])
    least = jnp.min(log_mass, axis=-1, keepdims=True)
    filling = table.misses[layer] < num_slots
    return cached | (log_mass >= least + math.log(admission_ratio)) | filling[..., None]


def segment_start(
    positions: Array, prompt_tokens: Array, segment_tokens: int, growth_tokens: int
) -> Array:
    """Find the first position of the segment that each index position lies in.

    A prompt's indexed part is cut into segments of `segment_tokens`, the last one shorter; then
    come the growth segments. A segment's clusters hold its own tokens, so its members' positions
    and its tokens' rows fill the same range.

    Args:
        positions: `[batch, ...]` int32.
        prompt_tokens: `[batch]` int32, how many of the indexed tokens came with the prompt.
        segment_tokens, growth_tokens: length of a prompt's segments and of those of growth.
    """
    prompt = prompt_tokens.reshape(-1, *(1,) * (positions.ndim - 1))
    in_prompt = positions // segment_tokens * segment_tokens
    in_growth = prompt + (positions - prompt) // growth_tokens * growth_tokens
    return jnp.where(positions < prompt, in_prompt, in_growth)


def select_tokens(
    ranked: RankedTokens,
    indexed: IndexedTokens,
    table: RowTable,
    layer: Array | int,
    step: Array,
    *,
    settings: SelectionSettings,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`."""
    offsets, token_ids, prompt_tokens = indexed
    batch, kv_heads = ranked.log_mass.shape[:2]
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    positions, clusters, masses = pick_positions(ranked, offsets[layer], settings.max_tokens)
    valid = positions != NO_ID
    ids = token_ids[layer, b, h, jnp.minimum(positions, token_ids.shape[-1] - 1)].astype(jnp.int32)
    start = segment_start(positions, prompt_tokens, settings.segment_tokens, settings.growth_tokens)
    tokens = jnp.where(valid, start + ids, NO_ID)
    if settings.admission_ratio > 1 and table.token_of_slot.size:
        valid &= worth_reading(tokens, masses, table, layer, settings.admission_ratio)
        tokens, clusters = (jnp.where(valid, x, NO_ID) for x in (tokens, clusters))
    slots, hit, table = look_up(tokens, table, layer, step)
    remaining = jnp.diff(offsets[layer], axis=-1).at[b, h, clusters].add(-1, mode="drop")
    hits = jnp.sum(hit, axis=-1, dtype=jnp.int32)
    misses = jnp.sum(valid, axis=-1, dtype=jnp.int32) - hits
    own = clusters if settings.with_clusters else None
    return Retrieved(tokens, slots, hit, remaining, table, hits, misses, own)
