"""What a decode step retrieves and what it estimates: steps 2 to 6 of `WaveAttention.decode`."""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels as ops
from pallas_kernels.encode_tokens import rotate
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import (
    MASKED,
    Candidates,
    ClusterScores,
    Correction,
    Estimate,
    Pooled,
    Reach,
    Retrieved,
    RowTable,
)
from wavejax.config import WaveConfig
from wavejax.store.index import WaveIndex
from wavejax.store.state import Selection
from wavejax.store.steady import SteadyZone


def score_clusters(
    query: Float[Array, "batch kv_heads group head_dim"],
    index: WaveIndex,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> ClusterScores:
    """Score the index's clusters; rotate the query for codes, multiply it with moments, if there.

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        index: the index.
        layer: int32, which layer.
        scale: multiplies every product of query and key.
    """
    coded = index.codes is not None
    directions = None if index.moments is None else index.moments.directions
    return ops.score_clusters(
        query,
        index.centroids,
        index.offsets,
        layer,
        scale=scale,
        rotated=coded,
        directions=directions,
        covariance=index.covariance,
    )


def of_all_tokens(
    scores: ClusterScores,
    query: Float[Array, "batch kv_heads group head_dim"],
    steady: SteadyZone,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> ClusterScores:
    """Make the masses shares of all attention, the steady zone's included.

    Most heads attend to the first tokens most, so that little is left to share among the others.

    Args:
        scores: from `score_clusters`, whose masses are shares of the clusters' together.
        query: grouped by kv head.
        steady: with the step's own row.
        layer: int32, which layer.
        scale: multiplies every product of query and key.
    """
    total = scores.logsumexp
    zones = (steady.sink, steady.sink_tokens), (steady.window, steady.window_tokens + 1)
    for rows, tokens in zones:
        if not rows.shape[3]:
            continue  # no sinks
        keys = rows[layer, ..., 0, :]
        logits = scale * jnp.einsum(
            "bhgd,bhnd->bhgn", query, keys, preferred_element_type=jnp.float32
        )
        exists = jnp.arange(keys.shape[2]) < tokens[:, None, None, None]
        total = jnp.logaddexp(total, log_sum_exp(jnp.where(exists, logits, MASKED), axis=-1))
    return scores._replace(logsumexp=total)


def select_clusters(
    config: WaveConfig,
    query: Float[Array, "batch kv_heads group head_dim"],
    scores: ClusterScores,
    index: WaveIndex,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> Candidates:
    """Select the clusters of most group mass, whose tokens are the candidates.

    Arguments as of `score_tokens`.
    """
    reach = None
    if config.reach and index.deviations is not None:
        length = jnp.linalg.norm(query.astype(jnp.float32), axis=-1)
        reach = Reach(config.reach * scale * length, index.deviations)
    return ops.select_clusters(
        scores.logits,
        scores.logsumexp,
        index.offsets,
        layer,
        budgets(config, index.tokens)[1],
        max_candidates=config.most_candidates(index.token_ids.shape[-1]),
        reach=reach,
    )


def score_tokens(
    config: WaveConfig,
    query: Float[Array, "batch kv_heads group head_dim"],
    scores: ClusterScores,
    chosen: Candidates,
    index: WaveIndex,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "batch kv_heads candidates"]:
    """Score the candidates' tokens, by their codes, or by their clusters where there are no codes.

    Args:
        config: the settings.
        query: one decode step's queries, grouped by the kv head that they share.
        scores: of the clusters, from `score_clusters` or `of_all_tokens`.
        chosen: the candidates, from `select_clusters`.
        index: the index.
        layer: int32, which layer.
        scale: multiplies every product of query and key.

    Returns:
        the logarithm of each token's group mass, float32, by candidate place.
    """
    if scores.rotated is None:
        scores = scores._replace(rotated=rotate(query))
    codes = None
    if index.codes is not None and index.scales is not None:
        codes = ops.TokenCodes(index.codes, index.scales)
    return ops.score_tokens(
        scores,
        chosen,
        index.offsets,
        codes,
        layer,
        scale=scale,
        max_candidates=config.most_candidates(index.token_ids.shape[-1]),
    )


def select_tokens(
    config: WaveConfig,
    log_mass: Float[Array, "batch kv_heads candidates"],
    chosen: Candidates,
    index: WaveIndex,
    table: RowTable,
    layer: Int[Array, ""],
    step: Int[Array, ""],
    *,
    budget: Int[Array, "batch kv_heads"] | None = None,
) -> Retrieved:
    """Select the candidates of most group mass.

    Args:
        config: the settings.
        log_mass: of the candidates, from `score_tokens`; by candidate place.
        chosen: the candidates, from `select_clusters`.
        index: the index.
        table: the row cache's.
        layer: int32, which layer.
        step: int32, the row cache's clock.
        budget: int32, tokens to retrieve, at most as many as the settings retrieve; None: as many.

    Returns:
        the tokens' store rows, where to read them, and what each cluster keeps.
    """
    most = budgets(config, index.tokens)[0]
    if budget is not None:
        most = jnp.minimum(most[:, None], budget)
    elif config.min_token_mass > 0:
        worth = log_mass >= math.log(config.min_token_mass)
        most = jnp.minimum(most[:, None], jnp.sum(worth, axis=-1, dtype=jnp.int32))
    return ops.select_tokens(
        ops.RankedTokens(log_mass, chosen, most),
        ops.IndexedTokens(index.offsets, index.token_ids, index.prompt_tokens),
        table,
        layer,
        step,
        settings=ops.SelectionSettings(
            config.most_retrieved(index.token_ids.shape[-1]),
            config.segment_tokens,
            config.growth_tokens,
            config.admission_ratio,
            index.moments is not None,
        ),
    )


def to_estimate(
    config: WaveConfig,
    scores: ClusterScores,
    retrieved: Retrieved,
    index: WaveIndex,
    layer: Int[Array, ""],
) -> Int[Array, "batch kv_heads clusters"]:
    """Decide how many members of each cluster to estimate: what it keeps, or what is not dropped.

    Args:
        config: the settings.
        scores: of the clusters, from `score_clusters`.
        retrieved: from `select_tokens`.
        index: the index.
        layer: int32, which layer.

    Returns:
        int32 numbers of members.
    """
    fraction = config.estimation_fraction
    if fraction >= 1:
        return retrieved.remaining
    if fraction <= 0:
        return jnp.zeros_like(retrieved.remaining)
    budget = budgets(config, index.tokens)[0] + _share(fraction, index.tokens)
    # Only whether a cluster is selected is asked: no room is needed for a list.
    near = ops.select_clusters(
        scores.logits, scores.logsumexp, index.offsets, layer, budget, max_candidates=1
    )
    return jnp.where(near.selected, retrieved.remaining, 0)


def selection_of(
    config: WaveConfig,
    query: Float[Array, "batch kv_heads group head_dim"],
    scores: ClusterScores,
    retrieved: Retrieved,
    index: WaveIndex,
    layer: Int[Array, ""],
) -> Selection:
    """Put together what a step attends to, with what it estimates: step 6.

    Args:
        config: the settings.
        query: one decode step's queries, grouped by the kv head that they share.
        scores: of the clusters, from `score_clusters`.
        retrieved: from `select_tokens`.
        index: the index.
        layer: int32, which layer.
    """
    estimated = to_estimate(config, scores, retrieved, index, layer)
    more = scores.products, retrieved.clusters, scores.pooled
    return Selection(query, *retrieved[:3], scores.logits, estimated, *more)


def estimate_of(selection: Selection, index: WaveIndex) -> Estimate:
    """Make what `attend_zones` estimates, with a correction where the index has one.

    Args:
        selection: of the step.
        index: the index.
    """
    correction = None
    if index.moments is not None:
        assert selection.products is not None
        assert selection.clusters is not None
        correction = Correction(index.moments, selection.products, selection.clusters, index.spread)
    pooled = None
    if index.covariance is not None:
        assert selection.pooled is not None
        assert index.deviations is not None
        pooled = Pooled(selection.pooled, index.deviations)
    return Estimate(
        selection.logits, index.value_means, index.offsets, selection.estimated, correction, pooled
    )


def budgets(
    config: WaveConfig, tokens: Int[Array, "*batch"]
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """Count the tokens to retrieve, and those whose codes to read, of indexed `tokens`: int32."""
    least = config.min_retrieved_tokens
    retrieved = jnp.maximum(least, _share(config.retrieval_fraction, tokens))
    candidates = retrieved
    if config.token_codes:
        floor = jnp.maximum(retrieved, config.min_candidate_tokens)
        candidates = jnp.maximum(floor, _share(config.candidate_fraction, tokens))
    return jnp.minimum(retrieved, tokens), jnp.minimum(candidates, tokens)


def _share(fraction: float, tokens: Array) -> Array:
    """Count a share of the tokens, rounded up."""
    if fraction >= 1:
        return tokens
    # A millionth less, so that a product that should be whole, 0.3 * 170, is rounded up to itself
    # whichever way a platform's float32 errs.
    return jnp.ceil(tokens.astype(jnp.float32) * (fraction * (1 - 1e-6))).astype(jnp.int32)
