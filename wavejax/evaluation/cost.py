"""What a decode step must read, and what an index takes, in bytes: counted by shapes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from wavejax.attention.dense import DenseAttention
from wavejax.attention.retrieval import budgets
from wavejax.attention.state_shapes import state_shapes
from wavejax.attention.wave import WaveAttention
from wavejax.config import WaveConfig
from wavejax.evaluation.baselines import PAGE_TOKENS, SparseAttention
from wavejax.store.index import WaveIndex
from wavejax.store.shape import CacheShape
from wavejax.store.sizes import segment_sizes
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes that a decode step must read of a KV cache: every array once, in whatever order.

    Not counted: the row cache's table, an audit, and anything that the step itself makes.

    Attributes:
        clusters: centroids, edges and deviations; of Quest the least and greatest keys of pages.
        moments: of the clusters; with bounds their spread too; or a head's covariance.
        codes: of the candidates, with scales, and the ids of the tokens retrieved.
        means: mean values of the clusters that are estimated.
        rows: keys and values of the tokens retrieved; of full attention, all of them.
        drawn: rows drawn to bound the error, once; what a tolerance reads after that depends on
            the text, and is left out.
        steady: rows of the steady zone, the step's own included.
    """

    clusters: float = 0
    moments: float = 0
    codes: float = 0
    means: float = 0
    rows: float = 0
    drawn: float = 0
    steady: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def times(self, count: float) -> "StepBytes":
        """Return the bytes of several layers or heads that read as much."""
        return StepBytes(*(count * each for each in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a method costs at one length.

    Attributes:
        step: bytes that a step reads of one sequence, over all layers and kv heads.
        index: bytes that finds tokens, of each indexed token and kv head.
    """

    step: StepBytes
    index: float


def cost_of(
    attention: DenseAttention | WaveAttention,
    shape: CacheShape,
    prompt_tokens: int,
    dtype: DTypeLike,
    clusters: float | None = None,
) -> Cost:
    """Count what the step after a prompt costs, from shapes alone.

    Of the oracle its rows are counted alone: its search, which reads all keys, is taken to be free.

    Args:
        attention: whose cost it is.
        shape: the layers and heads of the cache.
        prompt_tokens: of the prompt, 1 or more.
        dtype: the model's.
        clusters: how many a kv head has, in the mean; None takes those that k-means is asked for,
            before larger ones are cut.
    """
    layers, _, kv_heads = shape.stack(1)
    one = dataclasses.replace(shape, layers=1, kv_heads=1, kinds=())
    state = state_shapes(attention, one, 1, prompt_tokens, 1, jnp.dtype(dtype), prompt_tokens)
    if isinstance(attention, WaveAttention):
        tokens = attention.config.indexed_tokens(prompt_tokens)
        if clusters is None:
            clusters = clusters_asked_for(attention.config, tokens)
        steady = prompt_tokens + 1 - tokens
        step = wave_step_bytes(attention.config, state, tokens, clusters, steady)
        index = index_bytes(state.index, tokens, clusters)
    else:
        row = state.keys.row_bytes + state.values.row_bytes
        step, index = StepBytes(rows=row * (prompt_tokens + 1)), 0.0
        if isinstance(attention, SparseAttention):
            step, index = _sparse(attention, row, prompt_tokens)
    return Cost(step.times(layers * kv_heads), index)


def wave_step_bytes(
    config: WaveConfig, state: WaveState, tokens: int, clusters: float, steady: int
) -> StepBytes:
    """Count what a step of wave attention reads of one sequence, in one layer and kv head.

    Args:
        config: the settings.
        state: its arrays, or their shapes.
        tokens: in the index.
        clusters: in use.
        steady: tokens of the steady zone.
    """
    index = state.index
    retrieved, candidates = (int(x) for x in budgets(config, jnp.int32(tokens)))
    estimated = clusters * _share_estimated(config, retrieved, tokens)
    row, vectors = state.store.rows.row_bytes, 0.0
    if index.moments is not None:
        # Directions are multiplied with the query before anything is selected.
        directions, *others = index.moments
        vectors = clusters * _entry(directions)
        vectors += estimated * sum(map(_entry, (*others, *(index.spread or ()))))
    vectors += _of_head(index.covariance)
    return StepBytes(
        clusters=clusters * sum(map(_entry, (index.centroids, index.offsets, index.deviations))),
        moments=vectors,
        codes=candidates * (_entry(index.codes) + _entry(index.scales))
        + retrieved * _entry(index.token_ids),
        means=estimated * _entry(index.value_means),
        rows=retrieved * row,
        drawn=row * min(config.tolerance_draws, tokens - retrieved) if config.tolerance else 0,
        steady=steady * _entry(state.steady.window),
    )


def index_bytes(index: WaveIndex, tokens: int, clusters: float) -> float:
    """Count what an index takes for each token of a kv head; 0 without tokens.

    Args:
        index: its arrays, or their shapes.
        tokens: in it.
        clusters: in use.
    """
    by_cluster = (index.centroids, index.value_means, index.offsets, index.deviations)
    by_cluster += (*(index.moments or ()), *(index.spread or ()))
    of_token = sum(map(_entry, (index.codes, index.scales, index.token_ids)))
    if not tokens:
        return 0.0
    of_head = sum(map(_entry, by_cluster)) * clusters + _of_head(index.covariance)
    return of_head / tokens + of_token


def clusters_asked_for(config: WaveConfig, tokens: int) -> int:
    """Count the clusters that k-means makes of so many tokens; cut ones come on top."""
    mean, _ = config.cluster_sizes(tokens)
    sizes = segment_sizes(config, tokens)
    if not sizes:
        return 0
    full, rest = divmod(tokens, sizes[0])
    return full * -(-sizes[0] // mean) + -(-rest // mean)


def _share_estimated(config: WaveConfig, retrieved: int, tokens: int) -> float:
    """Return the share of the clusters that are estimated, as far as settings tell it.

    With codes the tokens retrieved lie here and there; without, clusters are retrieved whole.
    """
    if retrieved >= tokens or not config.estimation_fraction:
        return 0.0
    if config.token_codes:
        return min(1.0, config.estimation_fraction + retrieved / tokens)
    return min(config.estimation_fraction, 1 - retrieved / tokens)


def _sparse(attention: SparseAttention, row: int, prompt_tokens: int) -> tuple[StepBytes, float]:
    """Count what a method reads of one kv head that chooses among full attention's rows."""
    tokens = attention.config.indexed_tokens(prompt_tokens)
    retrieved = int(budgets(attention.config, jnp.int32(tokens))[0])
    steady = row * (prompt_tokens + 1 - tokens)
    if attention.rank != "page_bound":
        return StepBytes(rows=row * retrieved, steady=steady), 0.0
    # Keys alone, one least and one greatest: as much as a key and a value.
    pages = -(-tokens // PAGE_TOKENS)
    read = min(-(-retrieved // PAGE_TOKENS) * PAGE_TOKENS, tokens)
    step = StepBytes(clusters=row * pages, rows=row * read, steady=steady)
    return step, row * pages / tokens if tokens else 0.0


def _of_head(array: Any) -> int:
    """Return the bytes of what one layer and kv head of a sequence has; 0 for None."""
    return 0 if array is None else math.prod(array.shape[3:]) * array.dtype.itemsize


def _entry(array: Any) -> int:
    """Bytes of one entry of an array `[layers, batch, kv_heads, entries, ...]`; 0 for no array."""
    return 0 if array is None else math.prod(array.shape[4:]) * array.dtype.itemsize
