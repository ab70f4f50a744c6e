"""The row cache against a plain Python model, over random selections, growth and evictions.

What must hold whatever the cache's size: the row read is the right row, the two tables are inverse
to each other, no slot is lost, and no more is missed than a plain cache of as many slots misses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from pallas_kernels.select_clusters import list_candidates
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.types import EMPTY, MASKED, NO_ID, RowTable
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import WaveAttention, WaveConfig
from wavejax.store.shape import CacheShape

LAYERS, BATCH, HEADS, TOKENS, DIM, ROOM = 2, 2, 2, 24, 4, 8
LAYER = 1  # the one in use; nothing may happen in the other
SEGMENT, GROWTH = 16, 8
CLUSTER = 4
SLOTS = (1, 2, 3, 7, 8, 9, 24, 30)


class PlainCache:
    """A row cache in plain Python: one sequence and head."""

    def __init__(self, slots: int):
        self.slots = slots
        self.held: dict[int, tuple[int, int]] = {}  # slot -> token, the step that used it last

    def step(self, tokens: list[int], now: int) -> dict[int, int]:
        """Takes in a step's tokens; returns the slots of those that were found."""
        slot_of = {token: slot for slot, (token, _) in self.held.items()}
        found = {token: slot_of[token] for token in tokens if token in slot_of}
        for token, slot in found.items():
            self.held[slot] = token, now
        missed = [token for token in tokens if token not in found]
        # Rows that this step needs do not give way; empty slots are the first to be taken.
        idle = [slot for slot in range(self.slots) if slot not in found.values()]
        idle.sort(key=lambda slot: self.held[slot][1] if slot in self.held else -1)
        victims = sorted(idle[: len(missed)])
        for token, slot in zip(missed, victims, strict=False):
            self.held[slot] = token, now
        return found


def check_table(table: RowTable, layer: int, caches: dict, tokens: int) -> None:
    """Asserts that a layer's tables hold what the plain caches hold."""
    slot_of_token, token_of_slot, last_used = (np.asarray(part[layer]) for part in table[:3])
    for (b, h), cache in caches.items():
        owners = token_of_slot[b, h]
        assert owners.tolist() == [cache.held.get(slot, (EMPTY,))[0] for slot in range(cache.slots)]
        ages = [cache.held.get(slot, (EMPTY, EMPTY))[1] for slot in range(cache.slots)]
        assert last_used[b, h].tolist() == ages
        check_inverse(slot_of_token[b, h], owners, tokens)


def check_inverse(slot_of_token: np.ndarray, token_of_slot: np.ndarray, tokens: int) -> None:
    """Asserts that two tables of one row are inverse to each other, and hold known tokens only."""
    inverse = np.full_like(slot_of_token, EMPTY)
    owned = np.flatnonzero(token_of_slot >= 0)
    inverse[token_of_slot[owned]] = owned
    np.testing.assert_array_equal(slot_of_token, inverse)
    # Of two slots with one token, the inverse would name one alone.
    assert len(set(token_of_slot[owned].tolist())) == len(owned)
    assert (slot_of_token[tokens:] == EMPTY).all()


@functools.partial(jax.jit, static_argnames="slots")
def step_of_ops(slots, mass, budget, ids, prompt_tokens, used, table, store, cache_rows, now):
    """Selects among the first `used` positions and reads the rows; implementation "xla"."""
    clusters = TOKENS // CLUSTER
    edges = jnp.minimum(CLUSTER * jnp.arange(clusters + 1), used[:, None, None])
    offsets = jnp.broadcast_to(edges.astype(jnp.int32), (LAYERS, BATCH, HEADS, clusters + 1))
    sizes = jnp.diff(offsets[LAYER])
    every = list_candidates(sizes > 0, sizes, max_candidates=TOKENS)
    mass = jnp.where(jnp.arange(TOKENS) < used[:, None, None], mass, MASKED)
    found = ops.select_tokens(
        ops.RankedTokens(mass, every, budget),
        ops.IndexedTokens(offsets, ids, prompt_tokens),
        *(table, LAYER, now),
        settings=ops.SelectionSettings(ROOM, SEGMENT, GROWTH),
        implementation="xla",
    )
    nothing = jnp.zeros((LAYERS, BATCH, HEADS, 1, 2, DIM))
    # A query of zeros: the output is the mean of the values read.
    zones = ops.attend_zones(
        jnp.zeros((BATCH, HEADS, 1, DIM)),
        ops.SteadyRows(nothing, jnp.zeros(BATCH, int), nothing, jnp.zeros(BATCH, int)),
        ops.StoredRows(ops.Rows(store), ops.Rows(cache_rows)),
        ops.Picks(found.tokens, found.slots, found.hit),
        ops.Estimate(
            jnp.full((BATCH, HEADS, 1, clusters), MASKED),
            jnp.zeros((LAYERS, BATCH, HEADS, clusters, DIM)),
            offsets, jnp.zeros((BATCH, HEADS, clusters), jnp.int32),
        ),
        LAYER,
        scale=1.0, implementation="xla",
    )  # fmt: skip
    read, _ = ops.merge_states(zones.outputs, zones.logsumexps, implementation="xla")
    return found, read[:, :, 0], zones.cache_rows.data


steps = st.lists(
    st.tuples(
        st.integers(0, 2**31 - 1),  # of the masses
        st.lists(st.integers(0, ROOM), min_size=BATCH, max_size=BATCH),  # budgets
        st.booleans(),  # whether the index grows before
        st.booleans(),  # whether the last step's tokens are wanted again
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(slots=st.sampled_from(SLOTS), seed=st.integers(0, 2**31 - 1), steps=steps)
def test_ops_read_the_right_rows(slots, seed, steps):
    rng = np.random.default_rng(seed)
    row = (LAYERS, BATCH, HEADS)
    # Whole numbers that differ by one at least wherever a wrong row could be read: a mean of at
    # most eight of them cannot pass for another.
    store = np.zeros((*row, TOKENS, 2, DIM), np.float32)
    store[..., 1, :] = rng.integers(-(2**12), 2**12, (*row, TOKENS, DIM))
    cache_rows = np.full((*row, slots, 2, DIM), 2.0**20, np.float32)
    table = empty_table(row, TOKENS, slots)
    # A prompt of one full and one shorter segment or less, then segments of growth: within each
    # the positions hold its own tokens in an order of their own.
    used = rng.integers(1, TOKENS - GROWTH + 1, BATCH)
    prompt_tokens = used.copy()
    ids = np.zeros((*row, TOKENS), np.uint16)
    tokens_at = np.zeros((BATCH, HEADS, TOKENS), int)

    def fill(b, start, stop):
        for h in range(HEADS):
            order = rng.permutation(stop - start)
            ids[LAYER, b, h, start:stop] = order
            tokens_at[b, h, start:stop] = start + order

    for b in range(BATCH):
        for start in range(0, used[b], SEGMENT):
            fill(b, start, min(start + SEGMENT, used[b]))
    caches = {(b, h): PlainCache(slots) for b in range(BATCH) for h in range(HEADS)}
    cache_rows, store = jnp.asarray(cache_rows), jnp.asarray(store)
    mass = None
    for now, (mass_seed, budgets, grows, again) in enumerate(steps):
        for b in range(BATCH):
            if grows and used[b] + GROWTH <= TOKENS:
                fill(b, used[b], used[b] + GROWTH)
                used[b] += GROWTH
        if mass is None or not again:
            mass = np.random.default_rng(mass_seed).normal(size=(BATCH, HEADS, TOKENS))
        budget = np.minimum(budgets, used)
        found, read, cache_rows = step_of_ops(
            slots,
            jnp.asarray(mass, jnp.float32),
            jnp.asarray(budget, jnp.int32),
            jnp.asarray(ids),
            jnp.asarray(prompt_tokens, jnp.int32),
            jnp.asarray(used, jnp.int32),
            table,
            store,
            cache_rows,
            jnp.int32(now),
        )
        table = found.table
        for (b, h), cache in caches.items():
            masses = mass[b, h, : used[b]].astype(np.float32)
            best = np.sort(np.argsort(-masses, kind="stable")[: budget[b]])
            expected = tokens_at[b, h, best].tolist()
            got = found.tokens[b, h].tolist()
            assert got == expected + [NO_ID] * (ROOM - len(expected))
            slots_found = cache.step(expected, now)
            hit = found.hit[b, h].tolist()
            assert hit == [token in slots_found for token in got]
            for token, slot, yes in zip(got, found.slots[b, h].tolist(), hit, strict=True):
                if yes:
                    assert slot == slots_found[token]
            values = np.asarray(store[LAYER, b, h, expected, 1])
            mean = values.mean(0) if expected else np.zeros(DIM)
            np.testing.assert_allclose(read[b, h], mean, atol=2e-2, rtol=0)
        check_table(table, LAYER, caches, int(used.max()))
        # A slot that holds a row holds that very row.
        owners = np.asarray(table.token_of_slot[LAYER])
        for b, h, slot in zip(*np.nonzero(owners >= 0), strict=True):
            np.testing.assert_array_equal(
                cache_rows[LAYER, b, h, slot], store[LAYER, b, h, owners[b, h, slot]]
            )
        other = 1 - LAYER
        assert all((np.asarray(part[other]) == EMPTY).all() for part in table[:3])
        assert not np.asarray(table.hits[other] + table.misses[other]).any()
        assert (np.asarray(cache_rows[other]) == 2.0**20).all()


MODEL = model_of(kv_heads=2, group=2, head_dim=16)
# Slots of the cache, as a share of the tokens. Few: each compiles anew.
FRACTIONS = (0.0, 0.02, 0.3, 1.0)


def attention_of(cache_fraction):
    config = WaveConfig(
        local_tokens=16, growth_tokens=64, segment_tokens=128, cluster_size=8, max_cluster_size=16,
        min_candidate_tokens=48, min_retrieved_tokens=12, cache_fraction=cache_fraction,
    )  # fmt: skip
    return WaveAttention(config, "device", cached=True)


def run(attention, stream, lengths, chunks):
    """Reads prompts and decodes chunks of 50 tokens; yields the outputs and the state."""
    state = attention.init_state(CacheShape.of(MODEL), 2, 300, 150, jnp.float32)
    _, state = prefill(attention, state, stream, lengths, room=300)
    start = jnp.asarray(lengths, jnp.int32)
    yield None, state
    for _ in range(chunks):
        outputs, state = decode(attention, jax.tree.map(jnp.copy, state), stream, start, 50)
        start = start + 50
        yield outputs, state


@pytest.mark.slow(50)
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=2),
    cache_fraction=st.sampled_from(FRACTIONS[:-1]),
    chunks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_caches_size_changes_nothing_but_what_is_missed(lengths, cache_fraction, chunks, seed):
    """Prefill, decode steps and growth: every cached row is the row that the model gave."""
    stream = random_stream(MODEL, np.random.default_rng(seed), 460, 2)
    small = run(attention_of(cache_fraction), stream, lengths, chunks)
    whole = run(attention_of(FRACTIONS[-1]), stream, lengths, chunks)
    _, keys, values = (np.asarray(x) for x in stream)
    rows = np.stack([keys, values], axis=-2).swapaxes(1, 2)  # [batch, kv_heads, tokens, 2, dim]
    for (outputs, state), (expected, complete) in zip(small, whole, strict=True):
        if outputs is not None:
            np.testing.assert_allclose(outputs, expected, atol=1e-5)
        table = state.cache.table
        for b, h in np.ndindex(2, 2):
            indexed = int(state.index.tokens[b])
            stored = np.asarray(state.store.rows.data[0, b, h, :indexed])
            sinks = min(4, lengths[b])  # a shorter prompt is all of them
            own = rows[b, h, sinks : sinks + indexed]
            np.testing.assert_array_equal(stored, own)
            owners = np.asarray(table.token_of_slot[0, b, h])
            check_inverse(np.asarray(table.slot_of_token[0, b, h]), owners, indexed)
            held = np.flatnonzero(owners >= 0)
            cached = np.asarray(state.cache.rows.data[0, b, h, held])
            np.testing.assert_array_equal(cached, own[owners[held]])
        tables = [s.cache.table for s in (state, complete)]
        retrieved = [int((table.hits + table.misses).sum()) for table in tables]
        assert retrieved[0] == retrieved[1]
        assert int(tables[0].misses.sum()) >= int(tables[1].misses.sum())
