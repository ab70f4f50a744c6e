"""Exact selection: `select_clusters` and `select_tokens` against sorting and a plain model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from pallas_kernels.numerics import heaviest, list_places, ordered_bits
from pallas_kernels.select_clusters import list_candidates
from pallas_kernels.select_tokens import empty_table, segment_start
from pallas_kernels.types import EMPTY, GRANULE, MASKED, NO_ID, Reach

few_values = st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 2.0, 2.0000002, 1e30, -1e30])


def by_sorting(values, weights, budget):
    """What `heaviest` means, by a stable sort."""
    marked, held = np.zeros(len(values), bool), 0
    for i in np.argsort(-values, kind="stable"):
        if held < budget and weights[i] > 0:
            marked[i] = True
            held += weights[i]
    return marked


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(few_values, st.integers(0, 5)), min_size=12, max_size=12),
    st.integers(0, 70),
)
def test_heaviest_is_the_sorted_prefix_with_ties_to_the_lower_place(elements, budget):
    values = np.array([value for value, _ in elements], np.float32)
    weights = np.array([weight for _, weight in elements], np.int32)
    marked = heaviest(ordered_bits(jnp.asarray(values)), jnp.asarray(weights), jnp.int32(budget))
    np.testing.assert_array_equal(marked, by_sorting(values, weights, budget))


def test_list_places_compacts_in_order():
    mark = jnp.array([[False, True, True, False, True], [False] * 5])
    np.testing.assert_array_equal(
        list_places(mark, 4), [[1, 2, 4, NO_ID], [NO_ID, NO_ID, NO_ID, NO_ID]]
    )


def test_by_reach_clusters_that_lie_apart_come_before_their_means_do():
    """Of whole numbers, so that sums are exact; against sorting in float64."""
    rng = np.random.default_rng(8)
    batch, heads, group, clusters = 2, 3, 1, 40
    sizes = rng.integers(0, 9, (2, batch, heads, clusters))
    offsets = np.concatenate([np.zeros((2, batch, heads, 1)), np.cumsum(sizes, -1)], -1)
    logits = np.round(rng.normal(size=(batch, heads, group, clusters)) * 4)
    lengths = rng.integers(1, 4, (batch, heads, group)).astype(float)
    deviations = rng.integers(0, 6, (2, batch, heads, clusters)).astype(float)
    deviations[sizes == 0] = np.nan  # Not in use, it may hold anything.
    reach = Reach(jnp.asarray(lengths, jnp.float32), jnp.asarray(deviations, jnp.float32))
    given = (
        jnp.asarray(logits, jnp.float32),
        jnp.zeros((batch, heads, group), jnp.float32),
        jnp.asarray(offsets, jnp.int32),
        1,
        jnp.asarray([17, 60], jnp.int32),
    )
    chosen = ops.select_clusters(*given, max_candidates=64, reach=reach)
    plain = ops.select_clusters(*given, max_candidates=64)
    for b, h in np.ndindex(batch, heads):
        reached = logits[b, h, 0] + lengths[b, h, 0] * deviations[1, b, h]
        expected = by_sorting(np.nan_to_num(reached, nan=-99.0), sizes[1, b, h], (17, 60)[b])
        np.testing.assert_array_equal(chosen.selected[b, h], expected & (sizes[1, b, h] > 0))
    assert not np.array_equal(chosen.selected, plain.selected)


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_select_clusters_takes_most_group_mass_per_token(group, seed):
    rng = np.random.default_rng(seed)
    batch, heads, clusters = 2, 3, 40
    sizes = rng.integers(0, 9, (1, batch, heads, clusters))
    sizes[..., 30:] = 0
    offsets = np.concatenate([np.zeros((1, batch, heads, 1)), np.cumsum(sizes, -1)], -1)
    logits = rng.normal(size=(batch, heads, group, clusters)).astype(np.float32) * 4
    # Coarse values make ties.
    logits = np.where(sizes[0][:, :, None] > 0, np.round(logits), MASKED).astype(np.float32)
    logsumexp = np.zeros((batch, heads, group), np.float32)
    budget = np.array([17, 60], np.int32)
    chosen = ops.select_clusters(
        jnp.asarray(logits),
        jnp.asarray(logsumexp),
        jnp.asarray(offsets, jnp.int32),
        0,
        jnp.asarray(budget),
        max_candidates=64,
    )
    mass = jax.nn.logsumexp(jnp.asarray(logits), axis=2)
    for b in range(batch):
        for h in range(heads):
            expected = by_sorting(np.asarray(mass[b, h]), sizes[0, b, h], budget[b])
            # Equal masses may come out of two logsumexps a bit apart; with one head they do not.
            if group == 1:
                np.testing.assert_array_equal(chosen.selected[b, h], expected)
            held = sizes[0, b, h][np.asarray(chosen.selected[b, h])].sum()
            assert held == chosen.starts[b, h, -1]
            listed = np.flatnonzero(chosen.selected[b, h])
            assert chosen.clusters[b, h, : len(listed)].tolist() == listed.tolist()
            assert (chosen.clusters[b, h, len(listed) :] == NO_ID).all()
            starts = np.cumsum([0, *sizes[0, b, h][listed]])
            assert chosen.starts[b, h, : len(starts)].tolist() == starts.tolist()
            assert (chosen.starts[b, h, len(starts) :] == held).all()
            for i, first in enumerate(chosen.granules[b, h].tolist()):
                place = min(i * GRANULE, held - 1)
                assert starts[first] <= place < starts[first + 1]
            assert min(budget[b], sizes[0, b, h].sum()) <= held < budget[b] + 8


class PlainCache:
    """The row table in plain Python: one row of (sequence, head)."""

    def __init__(self, slots):
        self.owner, self.used = [EMPTY] * slots, [EMPTY] * slots

    def step(self, tokens, now):
        """Returns each token's slot (None for none) and whether it was a hit."""
        hits = {token: self.owner.index(token) for token in tokens if token in self.owner}
        for slot in hits.values():
            self.used[slot] = now
        misses = [token for token in tokens if token not in hits]
        idle = [slot for slot in range(len(self.owner)) if slot not in hits.values()]
        idle.sort(key=lambda slot: (self.used[slot], slot))
        victims = sorted(idle[: len(misses)])
        slots = dict(hits)
        for token, slot in zip(misses, victims, strict=False):
            self.owner[slot], self.used[slot] = token, now
            slots[token] = slot
        return [(slots.get(token), token in hits) for token in tokens]


select = jax.jit(ops.select_tokens, static_argnames="settings")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8, 30]), st.sampled_from([1.0, 2.0, 50.0]))
def test_row_table_follows_a_plain_model(seed, slots, ratio):
    rng = np.random.default_rng(seed)
    layers, batch, heads, tokens, room = 2, 2, 2, 24, 8
    table = empty_table((layers, batch, heads), tokens, slots)
    order = np.stack([rng.permutation(tokens) for _ in range(batch * heads)])
    ids = np.broadcast_to(order.reshape(1, batch, heads, tokens), (layers, batch, heads, tokens))
    offsets = jnp.broadcast_to(jnp.arange(0, tokens + 1, 4), (layers, batch, heads, 7))
    every = list_candidates(
        jnp.ones((batch, heads, 6), bool), jnp.full((batch, heads, 6), 4), max_candidates=tokens
    )
    plain = [[PlainCache(slots) for _ in range(heads)] for _ in range(batch)]
    counted = np.zeros((2, batch, heads), np.int64)
    for now in range(6):
        mass = rng.normal(size=(batch, heads, tokens)).astype(np.float32)
        budget = rng.integers(0, room + 1, batch)
        result = select(
            ops.RankedTokens(jnp.asarray(mass), every, jnp.asarray(budget, jnp.int32)),
            ops.IndexedTokens(
                offsets, jnp.asarray(ids, jnp.uint16), jnp.full(batch, tokens, jnp.int32)
            ),
            table,
            jnp.int32(1),
            jnp.int32(now),
            settings=ops.SelectionSettings(room, 64, 8, ratio),
        )
        table = result.table
        hits, retrieved = 0, np.zeros(batch, int)
        for b in range(batch):
            for h in range(heads):
                best = np.sort(np.argsort(-mass[b, h], kind="stable")[: budget[b]])
                wanted = ids[1, b, h][best].tolist()
                if counted[1, b, h] >= slots and wanted:
                    # Once its slots are given away, a row's missed tokens must be worth reading.
                    worth = mass[b, h][best] >= mass[b, h][best].min() + np.float32(math.log(ratio))
                    held = np.isin(wanted, plain[b][h].owner)
                    best = best[worth | held]
                expected = ids[1, b, h][best].tolist()
                retrieved[b] += len(expected)
                listed = [token for token in result.tokens[b, h].tolist() if token != NO_ID]
                assert listed == expected
                if ratio == 1:
                    assert result.tokens[b, h].tolist() == expected + [NO_ID] * (room - budget[b])
                verdict = plain[b][h].step(expected, now)
                hits += sum(hit for _, hit in verdict)
                read = np.asarray(result.tokens[b, h]) != NO_ID
                found = np.asarray(result.slots[b, h]), np.asarray(result.hit[b, h])
                got = list(zip(*(x[read].tolist() for x in found), strict=True))
                assert got == [(NO_ID if slot is None else slot, hit) for slot, hit in verdict]
                assert not found[1][~read].any()
                assert table.token_of_slot[1, b, h].tolist() == plain[b][h].owner
                kept = np.bincount(best // 4, minlength=6)
                np.testing.assert_array_equal(result.remaining[b, h], 4 - kept)
                owner = np.asarray(table.token_of_slot[1, b, h])
                inverse = np.full(tokens, EMPTY)
                inverse[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
                np.testing.assert_array_equal(table.slot_of_token[1, b, h], inverse)
        assert int(result.hits.sum()) == hits
        assert (result.hits + result.misses).sum(-1).tolist() == retrieved.tolist()
        if ratio == 1:
            assert retrieved.tolist() == (budget * heads).tolist()
        counted += np.stack([result.hits, result.misses])
        np.testing.assert_array_equal(np.stack([table.hits[1], table.misses[1]]), counted)
    assert (np.asarray(table.slot_of_token[0]) == EMPTY).all()  # the other layer
    assert not np.asarray(table.hits[0]).any()
    assert not np.asarray(table.misses[0]).any()


def test_segment_start_of_prompt_and_growth_segments():
    positions = jnp.array([[0, 7, 8, 15, 16, 19, 20, 22, 23, 26]])
    starts = segment_start(positions, jnp.array([20]), segment_tokens=8, growth_tokens=3)
    np.testing.assert_array_equal(starts, [[0, 0, 8, 8, 16, 16, 20, 20, 23, 26]])
