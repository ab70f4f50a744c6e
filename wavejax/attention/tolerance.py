"""A tolerance: heads whose error may be past it retrieve more, then may be computed exactly.

After a layer's output, `sampled_bound` bounds each query head's relative error. The kv heads of
which one is not within the tolerance retrieve more tokens: as many times as many as the bound is
times the tolerance, twice at least, and again, up to a cap. They alone are attended to anew. What
is still not within is counted, or computed exactly. All of it is one program of fixed shapes: a
loop that mostly goes round not once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.attend_zones.reference import attend_clusters
from pallas_kernels.types import MASKED
from wavejax.attention import retrieval
from wavejax.attention.audit import exact_output, place_of
from wavejax.attention.protocol import scale_of
from wavejax.attention.sampled_bound import sampled_bound
from wavejax.config import WaveConfig
from wavejax.store.room import window_tokens
from wavejax.store.rows import RowCache
from wavejax.store.state import Selection, WaveState
from wavejax.store.tolerance import count

Attend = Callable[[Selection, WaveState], tuple[ops.ZoneStates, WaveState]]
Output = Float[Array, "batch kv_heads group head_dim"]


class Kept(NamedTuple):
    """What `retrieve_within` comes to, and what it took.

    Attributes:
        output: `[batch, kv_heads, group, head_dim]` float32.
        bound: `[batch, kv_heads, group]` float32, of the output's relative error.
        first_bound: the same shape, before more tokens were retrieved.
        budget: `[batch, kv_heads]` int32, tokens that the output rests on.
        retrieved: the same shape, int32, those of earlier turns too.
        turns: int32 scalar, the first one included. In each of them tokens are drawn in all heads.
        cache: the row cache after them.
    """

    output: Array
    bound: Array
    first_bound: Array
    budget: Array
    retrieved: Array
    turns: Array
    cache: RowCache


def merge_zones(
    config: WaveConfig,
    layer: Int[Array, ""],
    selection: Selection,
    zones: ops.ZoneStates,
    state: WaveState,
    attend: Attend,
) -> tuple[Output, WaveState]:
    """Merge what a layer attended to; with a tolerance, see `keep_within`, whose arguments it has.

    Returns:
        the output in the query's dtype, and the state.
    """
    if config.tolerance:
        output, state = keep_within(config, layer, selection, zones, state, attend)
        return output.astype(selection.query.dtype), state
    dtype = selection.query.dtype
    return ops.merge_states(zones.outputs, zones.logsumexps, dtype=dtype)[0], state


def keep_within(
    config: WaveConfig,
    layer: Int[Array, ""],
    selection: Selection,
    zones: ops.ZoneStates,
    state: WaveState,
    attend: Attend,
) -> tuple[Output, WaveState]:
    """Bring a layer's heads within the tolerance, as far as the cap allows.

    Args:
        config: the settings, with a tolerance.
        layer: int32, which layer.
        selection: what the step attended to.
        zones: what came of it.
        state: after it.
        attend: step 7 of `WaveAttention.decode`, in this layer.

    Returns:
        the output, float32, and the state; its row cache and its log may have changed.
    """
    log = state.tolerance
    if log is None:
        raise InputError("`tolerance` is set, but the state was made without: make it anew")
    kept = retrieve_within(config, layer, selection, zones, state, attend, log.limits)
    limit = log.limits[:, None, None]
    state = dataclasses.replace(state, cache=kept.cache)
    within, output = kept.bound <= limit, kept.output
    if config.exact_fallback:
        output = _compute(config, layer, selection.query, output, ~within, state)
    log = count(log, kept.first_bound <= limit, within, config.exact_fallback)
    return output, dataclasses.replace(state, tolerance=log)


def retrieve_within(
    config: WaveConfig,
    layer: Int[Array, ""],
    selection: Selection,
    zones: ops.ZoneStates,
    state: WaveState,
    attend: Attend,
    limits: Float[Array, " batch"],
) -> Kept:
    """Retrieve more tokens in heads that are past a limit, until they are within it or at the cap.

    Args:
        config, layer, selection, zones, state, attend: as of `keep_within`.
        limits: of each sequence, relative errors.
    """
    output, first_bound = bound_error(config, layer, selection, zones, state, jnp.int32(0))
    tokens = state.index.token_ids.shape[-1]
    first = config.most_retrieved(tokens)
    cap = min(first * config.tolerance_cap, tokens)
    budget = jnp.full(output.shape[:2], first, jnp.int32)
    # A budget counts room; read are as many tokens as there are.
    held = state.index.tokens[:, None]
    read = jnp.minimum(budget, held)
    kept = Kept(output, first_bound, first_bound, budget, read, jnp.int32(1), state.cache)
    if cap <= first:
        return kept
    wide, limit = with_most(config, cap), limits[:, None, None]

    def fails(kept: Kept) -> Array:
        return jnp.any(next_budget(limit, kept.budget, kept.bound, cap) > 0)

    def retrieve_more(kept: Kept) -> Kept:
        more = next_budget(limit, kept.budget, kept.bound, cap)
        given = dataclasses.replace(state, cache=kept.cache)
        chosen, given = select_by_budget(wide, layer, selection.query, more, given)
        found, given = attend(chosen, given)
        output, bound = bound_error(config, layer, chosen, found, given, kept.turns)
        again = (more > 0)[..., None]
        return Kept(
            jnp.where(again[..., None], output, kept.output),
            jnp.where(again, bound, kept.bound),
            first_bound,
            jnp.maximum(kept.budget, more),
            kept.retrieved + jnp.minimum(more, held),
            kept.turns + 1,
            given.cache,
        )

    return lax.while_loop(fails, retrieve_more, kept)


def bound_error(
    config: WaveConfig,
    layer: Int[Array, ""],
    selection: Selection,
    zones: ops.ZoneStates,
    state: WaveState,
    turn: Array,
) -> tuple[Output, Float[Array, "batch kv_heads group"]]:
    """Merge the zones, and bound the output's relative error by `sampled_bound`.

    Args:
        config: the settings: `tolerance_draws` and `delta`.
        layer: int32, which layer.
        selection: what the step attended to.
        zones: what came of it.
        state: after it.
        turn: int32; each has draws of its own.

    Returns:
        the output and the bound of each query head, float32.
    """
    merged = ops.merge_states(zones.outputs, zones.logsumexps)
    known = jnp.zeros_like(merged[0])
    if state.index.moments is not None or state.index.covariance is not None:
        # By means alone the sum would be another.
        assert zones.estimated is not None
        estimated = zones.estimated[:, None, None, None]
        exact = ops.merge_states(zones.outputs, jnp.where(estimated, MASKED, zones.logsumexps))
        by_means = attend_clusters(retrieval.estimate_of(selection, state.index), layer)
        for output, logsumexp in (exact, by_means):
            known += jnp.exp(logsumexp - merged[1])[..., None] * (output - merged[0])
    given, scale = (config, layer, selection, known, merged, state, turn), scale_of(selection.query)
    return merged[0], sampled_bound(*given, scale=scale)


def next_budget(
    limit: Float[Array, "batch 1 1"],
    budget: Int[Array, "batch kv_heads"],
    bound: Float[Array, "batch kv_heads group"],
    cap: int,
) -> Int[Array, "batch kv_heads"]:
    """Say how many tokens each kv head is to retrieve now; 0 for one that is to stay as it is.

    As many times as many as its bound is times the limit, twice at least: what an earlier turn
    retrieved and drew is read for nothing. A NaN is not within the tolerance, and no number of
    tokens mends it.

    Args:
        limit: relative errors, above 0; infinity for none.
        budget: int32, tokens that each retrieved last.
        bound: float32, of each query head's relative error.
        cap: tokens that none retrieves more than.
    """
    past = bound > limit
    ratio = jnp.max(jnp.where(past, bound / limit, 0), axis=-1)
    wanted = budget * jnp.maximum(ratio, 2)
    # Not by a minimum in floats: a cap that they do not hold would never be reached.
    wanted = jnp.where(wanted >= cap, cap, jnp.ceil(wanted).astype(jnp.int32))
    more = jnp.any(past, axis=-1) & (budget < cap)
    return jnp.where(more, jnp.minimum(wanted, cap), 0)


def with_most(config: WaveConfig, cap: int) -> WaveConfig:
    """Return settings that retrieve up to the cap, of twice as many candidates."""
    return dataclasses.replace(
        config,
        min_retrieved_tokens=cap,
        min_candidate_tokens=max(config.min_candidate_tokens, 2 * cap),
        min_token_mass=0.0,
    )


def select_by_budget(
    config: WaveConfig,
    layer: Int[Array, ""],
    query: Float[Array, "batch kv_heads group head_dim"],
    budget: Int[Array, "batch kv_heads"],
    state: WaveState,
) -> tuple[Selection, WaveState]:
    """Select as steps 2 to 6 of `WaveAttention.decode` do, by a budget of each kv head."""
    index, scale = state.index, scale_of(query)
    scores = retrieval.score_clusters(query, index, layer, scale=scale)
    chosen = retrieval.select_clusters(config, query, scores, index, layer, scale=scale)
    masses = retrieval.score_tokens(config, query, scores, chosen, index, layer, scale=scale)
    table, step = state.cache.table, state.step
    retrieved = retrieval.select_tokens(
        config, masses, chosen, index, table, layer, step, budget=budget
    )
    selection = retrieval.selection_of(config, query, scores, retrieved, index, layer)
    cache = RowCache(state.cache.rows, retrieved.table)
    return selection, dataclasses.replace(state, cache=cache)


def _compute(
    config: WaveConfig,
    layer: Int[Array, ""],
    query: Float[Array, "batch kv_heads group head_dim"],
    output: Array,
    which: Array,
    state: WaveState,
) -> Array:
    """Compute some query heads exactly, one after another; as many as there are."""
    window, scale = window_tokens(config, state), scale_of(query)
    order = jnp.argsort(~which.ravel())

    def compute(i: Array, output: Array) -> Array:
        b, h, g = place_of(order[i], query)
        exact = exact_output(layer, b, h, query[b, h, g], state, window, scale=scale)
        return output.at[b, h, g].set(exact)

    return lax.fori_loop(0, jnp.sum(which, dtype=jnp.int32), compute, output)
