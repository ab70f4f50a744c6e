"""What a decode step retrieves and what it estimates: the wave index's query."""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels as ops
from pallas_kernels.encode_tokens import rotate
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import MASKED, Candidates, ClusterScores, Retrieved, RowTable
from wavejax.config import WaveConfig
from wavejax.store.index import WaveIndex
from wavejax.store.steady import SteadyZone


def score_clusters(
    query: Float[Array, "batch kv_heads group head_dim"],
    wave: WaveIndex,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> ClusterScores:
    """Scores the index's clusters; where it has codes, the query is rotated for them too.

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        wave: the index.
        layer: which layer.
        scale: multiplies every product of query and key.
    """
    coded = wave.codes is not None
    return ops.score_clusters(
        query, wave.centroids, wave.offsets, layer, scale=scale, rotated=coded
    )


def retrieve(
    config: WaveConfig,
    query: Float[Array, "batch kv_heads group head_dim"],
    scores: ClusterScores,
    wave: WaveIndex,
    table: RowTable,
    layer: Int[Array, ""],
    step: Int[Array, ""],
    *,
    scale: float,
) -> Retrieved:
    """Ranks the best clusters' tokens and retrieves the best of them, in one layer.

    Args:
        config: the settings.
        query: one decode step's queries, grouped by the kv head that they share.
        scores: of the clusters, from `score_clusters`; with `min_token_mass`, `of_all_tokens`.
        wave: the index.
        table: the row cache's.
        layer: which layer.
        step: the row cache's clock.
        scale: multiplies every product of query and key.

    Returns:
        the tokens' rows, where to read them, and what each cluster keeps.
    """
    chosen = choose_clusters(config, scores, wave, layer)
    if scores.rotated is None:
        scores = scores._replace(rotated=rotate(query))
    codes = None
    if wave.codes is not None and wave.scales is not None:
        codes = ops.TokenCodes(wave.codes, wave.scales)
    log_mass = ops.score_tokens(
        scores,
        chosen,
        wave.offsets,
        codes,
        layer,
        scale=scale,
        max_candidates=config.most_candidates(wave.token_ids.shape[-1]),
    )
    return pick_tokens(config, log_mass, chosen, wave, table, layer, step)


def of_all_tokens(
    scores: ClusterScores,
    query: Float[Array, "batch kv_heads group head_dim"],
    steady: SteadyZone,
    layer: Int[Array, ""],
    *,
    scale: float,
) -> ClusterScores:
    """Scores whose masses are shares of all attention, the steady zone's included.

    Most heads attend to the first tokens most, so that little is left to share among the others.

    Args:
        scores: from `score_clusters`, whose masses are shares of the clusters' together.
        query: grouped by kv head.
        steady: with the step's own row.
        layer: which layer.
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


def choose_clusters(
    config: WaveConfig, scores: ClusterScores, wave: WaveIndex, layer: Int[Array, ""]
) -> Candidates:
    """The best clusters, whose tokens are the candidates."""
    return ops.select_clusters(
        scores.logits,
        scores.logsumexp,
        wave.offsets,
        layer,
        budgets(config, wave.tokens)[1],
        max_candidates=config.most_candidates(wave.token_ids.shape[-1]),
    )


def pick_tokens(
    config: WaveConfig,
    log_mass: Float[Array, "batch kv_heads candidates"],
    chosen: Candidates,
    wave: WaveIndex,
    table: RowTable,
    layer: Int[Array, ""],
    step: Int[Array, ""],
) -> Retrieved:
    """The candidates of most mass, as `score_tokens` gives it: see `retrieve`."""
    budget = budgets(config, wave.tokens)[0]
    if config.min_token_mass > 0:
        worth = log_mass >= math.log(config.min_token_mass)
        budget = jnp.minimum(budget[:, None], jnp.sum(worth, axis=-1, dtype=jnp.int32))
    return ops.select_tokens(
        log_mass,
        chosen,
        budget,
        ops.IndexedTokens(wave.offsets, wave.token_ids, wave.prompt_tokens),
        table,
        layer,
        step,
        max_tokens=config.most_retrieved(wave.token_ids.shape[-1]),
        segment_tokens=config.segment_tokens,
        growth_tokens=config.growth_tokens,
        admission_ratio=config.admission_ratio,
    )


def to_estimate(
    config: WaveConfig,
    scores: ClusterScores,
    retrieved: Retrieved,
    wave: WaveIndex,
    layer: Int[Array, ""],
) -> Int[Array, "batch kv_heads clusters"]:
    """The members of each cluster to estimate: what it keeps, but none that the settings drop."""
    fraction = config.estimation_fraction
    if fraction >= 1:
        return retrieved.remaining
    if fraction <= 0:
        return jnp.zeros_like(retrieved.remaining)
    budget = budgets(config, wave.tokens)[0] + _share(fraction, wave.tokens)
    # Only whether a cluster is selected is asked: no room is needed for a list.
    near = ops.select_clusters(
        scores.logits, scores.logsumexp, wave.offsets, layer, budget, max_candidates=1
    )
    return jnp.where(near.selected, retrieved.remaining, 0)


def budgets(
    config: WaveConfig, tokens: Int[Array, "*batch"]
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """Tokens to retrieve, and tokens whose codes to read, of so many indexed ones."""
    least = config.min_retrieved_tokens
    retrieved = jnp.maximum(least, _share(config.retrieval_fraction, tokens))
    candidates = retrieved
    if config.token_codes:
        floor = jnp.maximum(retrieved, config.min_candidate_tokens)
        candidates = jnp.maximum(floor, _share(config.candidate_fraction, tokens))
    return jnp.minimum(retrieved, tokens), jnp.minimum(candidates, tokens)


def _share(fraction: float, tokens: Array) -> Array:
    """The share of so many tokens, rounded up."""
    if fraction >= 1:
        return tokens
    # A millionth less, so that a product that should be whole, 0.3 * 170, is rounded up to itself
    # whichever way a platform's float32 errs.
    return jnp.ceil(tokens.astype(jnp.float32) * (fraction * (1 - 1e-6))).astype(jnp.int32)
