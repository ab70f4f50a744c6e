"""A decode step's ops in one compiled program on a CUDA GPU, by kernels and by plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.testing import make_step
from pallas_kernels.types import EMPTY, MASKED, NO_ID
from tests.support.gpu_cases import SEED, assert_close, assert_table_is_inverse, shape, upcast
from tests.support.zone_operands import zone_operands

pytestmark = pytest.mark.gpu

KERNEL = "triton"


# Of what is picked, the share that may differ from what a float32 reference picks: the query that
# ranks is rounded to int8, so tokens at the end of the budget change places.
BORDERLINE = 0.01


def step(x, table, cache_rows, layer, now, *, shape, implementation):
    """The ops as the engine chains them: output, what was retrieved, table and cache rows."""
    named = {"implementation": implementation}
    scores = ops.score_clusters(
        x.query, x.centroids, x.offsets, layer, scale=shape.scale, rotated=True, **named
    )
    chosen = ops.select_clusters(
        *(*scores[:2], x.offsets, layer, x.candidate_budget),
        max_candidates=shape.max_candidates,
        **named,
    )
    log_mass = ops.score_tokens(
        scores,
        chosen,
        x.offsets,
        ops.TokenCodes(x.codes, x.scales),
        layer,
        scale=shape.scale,
        max_candidates=shape.max_candidates,
        **named,
    )
    retrieved = ops.select_tokens(
        ops.RankedTokens(log_mass, chosen, x.retrieved_budget),
        ops.IndexedTokens(x.offsets, x.token_ids, x.prompt_tokens),
        *(table, layer, now),
        settings=shape.selection,
        **named,
    )
    picks = (retrieved.tokens, retrieved.slots, retrieved.hit, retrieved.remaining)
    *merged, cache_rows = attend(x, cache_rows, scores[0], picks, layer, shape, implementation)
    counts = (retrieved.hits, retrieved.misses)
    return (*merged, *counts, picks), retrieved.table, cache_rows


def attend(x, cache_rows, logits, picks, layer, shape, implementation):
    """Output and log-sum-exp of all zones, given what was retrieved, and the cache rows."""
    tokens, slots, hit, remaining = picks
    named = {"implementation": implementation}
    arrays = x._replace(
        tokens=tokens, slots=slots, hit=hit, remaining=remaining, cache_rows=cache_rows
    )
    operands = zone_operands(arrays._asdict() | {"logits": logits})
    zones = ops.attend_zones(*operands, layer, scale=shape.scale, **named)
    return *ops.merge_states(zones.outputs, zones.logsumexps, **named), zones.cache_rows.data


def differing(found, expected):
    """How many of the tokens found a row's reference did not pick, and how many it picked."""
    rows = zip(*(np.asarray(x).reshape(-1, x.shape[-1]) for x in (found, expected)), strict=True)
    sets = [({*mine} - {NO_ID}, {*best} - {NO_ID}) for mine, best in rows]
    return sum(len(mine - best) for mine, best in sets), sum(len(best) for _, best in sets)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_steps_in_one_program(name, store):
    """Two layers, twice over: the second time every row is a hit and the result the same."""
    s = shape(name)
    # A cache of stale rows would be read in place of the store's: start from an empty one.
    x = make_step(s, SEED, layers=3, ragged=True, store=store)
    slots_of, slots = x.table.slot_of_token, x.table.token_of_slot.shape[-1]
    empty = empty_table(slots_of.shape[:3], slots_of.shape[-1], slots)
    order = ((1, 2), (1, 1), (2, 2), (2, 1))

    def program(implementation):
        one = functools.partial(step, shape=s, implementation=implementation)

        def run(x, table, cache_rows):
            results = []
            for now, layer in order:
                found, table, cache_rows = one(
                    x, table, cache_rows, jnp.int32(layer), jnp.int32(now)
                )
                results.append(found)
            return results, table, cache_rows

        return jax.jit(run, donate_argnums=(1, 2))

    @jax.jit
    def attend_to(x, cache_rows, picks, layer):
        """By plain JAX, all rows from the store: which lie in the cache is the kernels' affair."""
        tokens, _, _, remaining = picks
        nowhere, missed = jnp.full_like(tokens, NO_ID), jnp.zeros(tokens.shape, bool)
        logits = ops.score_clusters(
            x.query, x.centroids, x.offsets, layer, scale=s.scale, implementation="xla"
        ).logits
        picks = (tokens, nowhere, missed, remaining)
        return attend(x, cache_rows, logits, picks, layer, s, "xla")[:2]

    def fresh(cache_rows):
        return jax.tree.map(jnp.copy, empty), jnp.full_like(cache_rows, jnp.nan)

    kernels = program(KERNEL)
    runs = [kernels(x, *fresh(x.cache_rows)) for _ in range(2)]
    for first, second in zip(*map(jax.tree.leaves, runs), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()
    results, table, cache_rows = runs[0]
    exact = upcast(x)
    references, _, _ = program("xla")(exact, *fresh(exact.cache_rows))

    full = np.asarray(x.retrieved_budget)[:, None]
    for i, ((output, logsumexp, hits, misses, picks), best) in enumerate(
        zip(results, references, strict=True)
    ):
        others, picked = differing(picks[0], best[-1][0])
        assert others <= BORDERLINE * picked, f"step {i}: {others} of {picked} (seed {SEED})"
        # A token that takes another's place at the end of the budget may weigh a hundredth of a
        # small row's output: so what was picked is held to the reference's picks, what is attended
        # to the kernels' own.
        expected = attend_to(exact, exact.cache_rows, picks, jnp.int32(order[i][1]))
        assert_close(output, expected[0], s.dtype, f"output {i}")
        assert_close(logsumexp, expected[1], s.dtype, f"logsumexp {i}")
        np.testing.assert_array_equal(hits if i >= 2 else misses, np.broadcast_to(full, hits.shape))
        np.testing.assert_array_equal(misses if i >= 2 else hits, 0)
    # Sequences without a single token.
    tokens = x.offsets[2, :, 0, -1] + x.sink_tokens + x.window_tokens
    assert (np.asarray(results[0][1])[np.asarray(tokens) == 0] <= MASKED / 2).all()

    assert_table_is_inverse(table)
    owner = np.asarray(table.token_of_slot)
    assert (owner[0] == EMPTY).all()
    rows = np.asarray(x.store.astype(jnp.float32) if store == "device" else x.store)
    rows, cached = rows.astype(np.float32), np.asarray(cache_rows).astype(np.float32)
    for layer, b, h in np.ndindex(owner.shape[:3]):
        slots = np.flatnonzero(owner[layer, b, h] >= 0)
        tokens = owner[layer, b, h, slots]
        np.testing.assert_array_equal(cached[layer, b, h, slots], rows[layer, b, h, tokens])
