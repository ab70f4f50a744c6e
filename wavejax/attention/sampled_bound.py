"""A statistical bound of a step's error: some estimated tokens are read, and held to the estimate.

Masses are shares of what the step takes all mass to be, and o^ is its output. A token i that is
estimated has mass w_i and value v_i in truth, u_i and c_i by its cluster's means. With the exact
output o and the true mass D of everything

    D (o - o^) = known + sum of z_i,    z_i = w_i (v_i - o^) - u_i (c_i - o^)

and D = 1 + sum of (w_i - u_i), both over the estimated tokens. What is known is zero where the
estimate is by means alone. Tokens are drawn with probabilities pi_i near to u_i's share: the mean
of z_i / pi_i is the sum, without bias, and varies by how far true masses are from estimated ones.
docs/bounds.md derives the bound.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.attend_zones.reference import read_stored
from pallas_kernels.numerics import is_masked
from pallas_kernels.rounding import dequantise
from pallas_kernels.select_tokens.reference import segment_start
from pallas_kernels.types import NO_ID
from wavejax.config import WaveConfig
from wavejax.store.room import lengths
from wavejax.store.state import Selection, WaveState

# Of the draws, the share that goes by numbers of tokens, whatever their estimated mass.
UNIFORM = 0.1

_SEED = 52


class Draws(NamedTuple):
    """Tokens drawn at random from a head's clusters, and how probable each was.

    Attributes:
        rows: `[batch, kv_heads, draws]` int32, store rows; anything where nothing is estimated.
        clusters: the same shape, int32.
        log_pi: the same shape, float32, logarithms of the probabilities.
        remains: the same shape, bool, whether the token is estimated: it was not retrieved.
    """

    rows: Array
    clusters: Array
    log_pi: Array
    remains: Array


def sampled_bound(
    config: WaveConfig,
    layer: Int[Array, ""],
    selection: Selection,
    known: Float[Array, "batch kv_heads group head_dim"],
    merged: tuple[
        Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads group"]
    ],
    state: WaveState,
    turn: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "batch kv_heads group"]:
    """Read some estimated tokens' rows, and bound the output's relative error by them.

    Args:
        config: the settings: `tolerance_draws` and `delta`.
        layer: int32, which layer.
        selection: what the step attends to.
        known: of D (o - o^), what is known; float32.
        merged: the step's output, and the logarithm of what it takes all mass to be; float32.
        state: with the step's own row.
        turn: int32; each has draws of its own. They depend on it, the layer, the head and the
            sequence's length alone: a batch does not change them.
        scale: multiplies every product of query and key.

    Returns:
        float32, at least |o - o^| / |o| of each query head, but for a probability of about delta;
        infinite where o may be zero for all that the draws say.
    """
    output, logsumexp = merged
    index = state.index
    remaining = jnp.minimum(selection.estimated, jnp.diff(index.offsets[layer], axis=-1))
    there = (remaining > 0)[:, :, None] & ~is_masked(selection.logits)
    u = jnp.where(there, jnp.exp(selection.logits - logsumexp[..., None]), 0)
    drawn = draw_tokens(config, layer, jnp.sum(u, axis=2), remaining, selection, state, turn)
    remains = drawn.remains
    rows = dequantise(read_stored(state.store.rows, layer, jnp.where(remains, drawn.rows, 0)))
    # Where nothing is estimated there may be anything, NaN included.
    rows = jnp.where(remains[..., None, None], rows, 0).astype(jnp.float32)
    keys, values = rows[..., 0, :], rows[..., 1, :]
    means = jnp.take_along_axis(index.value_means[layer], drawn.clusters[..., None], axis=2)
    means = jnp.where(remains[..., None], means, 0).astype(jnp.float32)
    query = selection.query.astype(jnp.float32)
    log_w = scale * jnp.einsum("bhgd,bhnd->bhgn", query, keys) - logsumexp[..., None]
    log_pi = jnp.where(remains, drawn.log_pi, 0)[:, :, None]
    w = jnp.where(remains[:, :, None], jnp.exp(log_w - log_pi), 0)
    own = jnp.take_along_axis(u, drawn.clusters[:, :, None], axis=-1)
    own = jnp.where(remains[:, :, None], own * jnp.exp(-log_pi), 0)
    from_output = output[:, :, :, None]
    true = w[..., None] * (values[:, :, None] - from_output)
    estimated = own[..., None] * (means[:, :, None] - from_output)
    return bound_of_draws(true - estimated, w - own, known, output, config.delta)


def draw_tokens(
    config: WaveConfig,
    layer: Int[Array, ""],
    masses: Float[Array, "batch kv_heads clusters"],
    remaining: Int[Array, "batch kv_heads clusters"],
    selection: Selection,
    state: WaveState,
    turn: Int[Array, ""],
) -> Draws:
    """Draw tokens of the clusters, by their estimated masses and a little by their number.

    One draw in each of equal parts of the probability: these vary no more than independent ones.

    Args:
        config: the settings.
        layer: int32, which layer.
        masses: of one member of each cluster, summed over the query heads.
        remaining: int32, how many members of each cluster are estimated.
        selection: what the step attends to.
        state: with the step's own row.
        turn: int32, see `sampled_bound`.
    """
    index, draws = state.index, config.tolerance_draws
    offsets = index.offsets[layer]
    batch, kv_heads, clusters = masses.shape
    sizes = jnp.diff(offsets, axis=-1)
    held = remaining.astype(jnp.float32)
    shares = (1 - UNIFORM) * _normalised(held * masses) + UNIFORM * _normalised(held)
    shares = _normalised(shares)
    ends = jnp.cumsum(shares, axis=-1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), layer), turn)

    def uniform(length: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, length), (2, kv_heads, draws))

    within, member = jnp.moveaxis(jax.vmap(uniform)(lengths(state)), 1, 0)
    at = (jnp.arange(draws) + within) / draws * ends[..., -1:]
    find = jax.vmap(jax.vmap(lambda ends, at: jnp.searchsorted(ends, at, side="right")))
    # By rounding the last part may end past the last cluster that has a share.
    last = clusters - 1 - jnp.argmax((shares > 0)[..., ::-1], axis=-1)
    chosen = jnp.minimum(find(ends, at), last[..., None]).astype(jnp.int32)

    def of_chosen(x: Array) -> Array:
        return jnp.take_along_axis(x, chosen, axis=-1)

    size = of_chosen(sizes)
    inside = jnp.clip((member * size).astype(jnp.int32), 0, jnp.maximum(size - 1, 0))
    positions = of_chosen(offsets[..., :-1]) + inside
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    ids = index.token_ids[layer, b, h, jnp.minimum(positions, index.token_ids.shape[-1] - 1)]
    segments = config.segment_tokens, config.growth_tokens
    rows = segment_start(positions, index.prompt_tokens, *segments) + ids.astype(jnp.int32)
    members = jnp.maximum(size, 1).astype(jnp.float32)
    return Draws(
        rows,
        chosen,
        jnp.log(jnp.maximum(of_chosen(shares), 1e-30)) - jnp.log(members),
        (of_chosen(remaining) > 0) & ~_among(rows, selection.tokens),
    )


def bound_of_draws(
    z: Float[Array, "*heads draws head_dim"],
    a: Float[Array, "*heads draws"],
    known: Float[Array, "*heads head_dim"],
    output: Float[Array, "*heads head_dim"],
    delta: float,
) -> Float[Array, "*heads"]:
    """Bound the relative error by draws of its parts; see `sampled_bound`.

    Args:
        z: of each draw z_i / pi_i; two draws or more.
        a: of each draw (w_i - u_i) / pi_i.
        known: of D (o - o^), what is known.
        output: o^.
        delta: with about which probability the bound may be too small.
    """
    draws = z.shape[-2]
    pairs = draws * (draws - 1)
    mean = jnp.mean(z, axis=-2)
    centred = z - mean[..., None, :]
    squares = jnp.sum(centred**2, axis=-1)
    sum_ = mean + known
    # The sum's squared length without what noise adds to it, and how that varies.
    noise = jnp.sum(squares, axis=-1) / pairs
    square = jnp.maximum(jnp.sum(sum_**2, axis=-1) - noise, 0)
    along = jnp.sum(jnp.einsum("...md,...d->...m", centred, sum_) ** 2, axis=-1) / pairs
    # Half of delta for the sum, half for the mass.
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    length = jnp.sqrt(square + quantile * jnp.sqrt(4 * along + 2 * noise**2))
    # As if one more draw were as large as the largest: few of what is drawn is much of the sum.
    length += jnp.sqrt(jnp.max(squares, axis=-1)) / draws
    mass = 1 + jnp.mean(a, axis=-1) - quantile * jnp.std(a, axis=-1) / math.sqrt(draws - 1)
    norm = jnp.linalg.norm(output, axis=-1)

    error = length / jnp.maximum(mass, 1e-6)
    # The exact output is no shorter than by the error itself.
    unknown = jnp.where(error > 0, jnp.inf, 0)
    return jnp.where(error < norm, error / jnp.maximum(norm - error, 1e-30), unknown)


def _normalised(x: Array) -> Array:
    total = jnp.sum(x, axis=-1, keepdims=True)
    return x / jnp.where(total > 0, total, 1)


def _among(
    rows: Int[Array, "batch kv_heads draws"], listed: Int[Array, "batch kv_heads retrieved"]
) -> Bool[Array, "batch kv_heads draws"]:
    """Say which rows are listed; NO_ID, of the list, is none."""
    ordered = jnp.sort(listed, axis=-1)
    find = jax.vmap(jax.vmap(lambda listed, rows: jnp.searchsorted(listed, rows)))
    place = jnp.minimum(find(ordered, rows), ordered.shape[-1] - 1)
    found = jnp.take_along_axis(ordered, place, axis=-1)
    return (found == rows) & (found != NO_ID)
