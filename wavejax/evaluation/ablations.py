"""Wave attention with parts of its ranking replaced, in plain JAX: to show what each is worth."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.encode_tokens import rotate
from pallas_kernels.numerics import heaviest, log_sum_exp, ordered_bits
from pallas_kernels.rounding import dequantise
from pallas_kernels.score_tokens.reference import list_members
from pallas_kernels.select_tokens.reference import segment_start
from pallas_kernels.types import MASKED, NO_ID, Candidates, ClusterScores, Retrieved
from wavejax.attention import retrieval
from wavejax.attention.wave import WaveAttention, scale_of
from wavejax.store.state import Selection, WaveState

# Of a uniform quantiser with so many bits, the step that loses least of a Gaussian, in its standard
# deviations (Max, Quantizing for minimum distortion, 1960, table II).
STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}


class Ranked(NamedTuple):
    """The candidates' tokens of one layer, and what their codes say of them.

    Attributes:
        chosen: the candidates' clusters.
        log_mass: `[batch, kv_heads, candidates]` float32, by which they rank; MASKED past the last.
        positions, clusters: `[batch, kv_heads, candidates]` int32; NO_ID past the last one.
        estimate: `[batch, kv_heads, group, candidates]` float32, of their logits.
        variance: the same shape, of the estimate's error.
        picked: `[batch, kv_heads, candidates]` bool, those that are retrieved.
    """

    chosen: Candidates
    log_mass: Array
    positions: Array
    clusters: Array
    estimate: Array
    variance: Array
    picked: Array


@dataclasses.dataclass(frozen=True)
class AblatedAttention(WaveAttention):
    """Wave attention, rows on the device, that ranks by codes made anew in each step.

    With its defaults it retrieves what `WaveAttention` does, but for ties in the last bits.

    Attributes:
        code_bits: of a code, for each dimension: 1 to 8. By one, the sign; by more, a uniform
            quantiser; either scaled so that a residual's product with its own code is exact.
        rotated: whether residuals are rotated at random before they are coded.
        group_by: what ranks a token for the query heads that share a kv head: "sum", of its
            masses, or "max", the largest one.
        corrected: candidates that are not retrieved are estimated with the mean mass that their
            codes say they have, less what the codes' errors add to it on average; by default with
            the mass of their cluster's centroid.

    Raises:
        InputError: a field is none of these, or the rows are not on the device.
    """

    code_bits: int = 1
    rotated: bool = True
    group_by: str = "sum"
    corrected: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_bits not in STEPS:
            raise InputError(f"code_bits is {self.code_bits}; it must be from 1 to {max(STEPS)}")
        if self.group_by not in ("sum", "max"):
            raise InputError(f"group_by is {self.group_by!r}; it must be sum or max")
        if self.store != "device" or not self.config.token_codes:
            raise InputError("an ablation of the codes needs token_codes, and rows on the device")
        for name in ("moment_rank", "pooled_covariance"):
            if self.corrected and getattr(self.config, name):
                raise InputError(f"`corrected` and `{name}` are two corrections; give one of them")
        if self.config.min_token_mass:
            raise InputError("an ablation of the codes has no min_token_mass; leave it at 0")

    def retrieve(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch kv_heads group head_dim"],
        scores: ClusterScores,
        state: WaveState,
    ) -> Retrieved:
        """See `WaveAttention`."""
        ranked = self._rank(layer, query, scores, state)
        best = ranked.log_mass, ranked.chosen
        return retrieval.select_tokens(
            self.config, *best, state.index, state.cache.table, layer, state.step
        )

    def select(
        self, layer: Array, query: Array, key: Array, value: Array, state: WaveState
    ) -> tuple[Selection, WaveState]:
        """See `WaveAttention`."""
        selection, new = super().select(layer, query, key, value, state)
        if not self.corrected:
            return selection, new
        index, scale = state.index, scale_of(query)
        scores = ops.score_clusters(
            selection.query, index.centroids, index.offsets, layer, scale=scale
        )
        ranked = self._rank(layer, selection.query, scores, state)
        logits = _corrected(selection.logits, ranked)
        return selection._replace(logits=logits), new

    def _tokens(self, layer: Array, positions: Array, state: WaveState) -> Array:
        """Return the rows at index positions; of those past the last one, any."""
        index, config = state.index, self.config
        batch, kv_heads, _ = positions.shape
        b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
        safe = jnp.minimum(positions, index.token_ids.shape[-1] - 1)
        start = segment_start(
            safe, index.prompt_tokens, config.segment_tokens, config.growth_tokens
        )
        return start + index.token_ids[layer, b, h, safe].astype(jnp.int32)

    def _rank(self, layer: Array, query: Array, scores: ClusterScores, state: WaveState) -> Ranked:
        index, scale, head_dim = state.index, scale_of(query), query.shape[-1]
        given = self.config, query, scores, index, layer
        chosen = retrieval.select_clusters(*given, scale=scale)
        most = self.config.most_candidates(index.token_ids.shape[-1])
        positions, clusters = list_members(chosen, index.offsets[layer], most)
        listed = clusters != NO_ID
        batch, kv_heads, _ = positions.shape
        b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
        at = jnp.where(listed, clusters, 0)
        tokens = self._tokens(layer, positions, state)
        keys = dequantise(jax.tree.map(lambda x: x[layer, b, h, tokens, 0], state.store.rows))
        residual = keys.astype(jnp.float32) - index.centroids[layer, b, h, at].astype(jnp.float32)
        turned = rotate if self.rotated else jnp.float32
        residual, turned_query = turned(residual), turned(query)
        code = quantise(residual, self.code_bits)
        length = jnp.linalg.norm(residual, axis=-1)
        along = jnp.sum(residual * code, axis=-1)  # zero for a residual of zero
        stretch = jnp.where(along > 0, length**2 / jnp.maximum(along, 1e-30), 0.0)
        product = jnp.einsum("bhgd,bhmd->bhgm", turned_query, code) * stretch[:, :, None]
        centre = jnp.take_along_axis(scores.logits, at[:, :, None], axis=-1)
        estimate = centre + scale * product
        # RaBitQ's error (arXiv 2405.12497, theorem 3.2), for a code of any width.
        cosine = along / jnp.maximum(length * jnp.linalg.norm(code, axis=-1), 1e-30)
        tangent = jnp.where(along > 0, (1 - cosine**2) / jnp.maximum(cosine**2, 1e-30), 0.0)
        norm = jnp.sum(jnp.square(turned_query), axis=-1)
        variance = norm[..., None] * (scale**2 * length**2 * tangent / (head_dim - 1))[:, :, None]
        share = estimate - scores.logsumexp[..., None]
        mass = log_sum_exp(share, axis=2) if self.group_by == "sum" else jnp.max(share, axis=2)
        mass = jnp.where(listed, mass, MASKED)
        budget = retrieval.budgets(self.config, index.tokens)[0]
        row_budget = jnp.broadcast_to(budget[:, None], mass.shape[:2])
        picked = heaviest(ordered_bits(mass), listed.astype(jnp.int32), row_budget)
        return Ranked(chosen, mass, positions, clusters, estimate, variance, picked)


def quantise(x: Float[Array, "*batch dim"], bits: int) -> Float[Array, "*batch dim"]:
    """Numbers of 2**bits levels, even and symmetric about zero; of a vector of zeros, zeros."""
    deviation = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
    step = STEPS[bits] * deviation
    level = jnp.floor(x / jnp.maximum(step, 1e-30))
    return step * (jnp.clip(level, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5)


def _corrected(logits: Array, ranked: Ranked) -> Array:
    """Logits by which the candidates' clusters have the mean mass of their unpicked tokens."""
    left = (ranked.clusters != NO_ID) & ~ranked.picked
    batch, kv_heads, group, _ = logits.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    cluster = jnp.where(left, ranked.clusters, NO_ID)
    # A mass of exp(x) seen with an error of variance v is exp(v / 2) times too large on average.
    log_mass = ranked.estimate - 0.5 * ranked.variance
    at = jnp.where(left, ranked.clusters, 0)
    relative = jnp.exp(log_mass - jnp.take_along_axis(logits, at[:, :, None], axis=-1))
    count = jnp.zeros((batch, kv_heads, logits.shape[-1])).at[b, h, cluster].add(1, mode="drop")
    g = jnp.arange(group)[None, None, :, None]
    total = jnp.zeros_like(logits).at[b[..., None], h[..., None], g, cluster[:, :, None]]
    mean = total.add(relative, mode="drop") / jnp.maximum(count, 1)[:, :, None]
    return jnp.where((count > 0)[:, :, None], logits + jnp.log(jnp.maximum(mean, 1e-30)), logits)
