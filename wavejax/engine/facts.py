"""What a generation cost and used: the line of facts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wavejax.attention.protocol import AnyAttention
from wavejax.engine.staged_state import StagedState
from wavejax.store.tolerance import met_by


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts of an attention state.

    Attributes:
        retrieved_share: of all tokens that full attention would have read, the share that was
            retrieved; 1.0 for full attention, None before the first step.
        hit_ratio: of the rows retrieved, the share found in the row cache; None where nothing was
            retrieved, without a row cache, and for full attention.
        device_bytes: of the state, in the device's memory.
        host_bytes: of the state, in host memory: pinned, or `fetch="staged"`'s rows.
        indexed_tokens: of all sequences, tokens in the index, from which some are retrieved and the
            rest estimated; 0 where all tokens are attended to exactly.
        audited: query heads that an audit computed exactly too, of those that it keeps.
        error_median, error_99: of these, the median and the 99th percentile of the true relative
            error of attention's output; None without an audit.
        within: of all query heads, layers and steps, the share that a tolerance's bound was met by,
            exact computation counted; None without a tolerance.
        more, computed: of all, the shares that met it only after more tokens had been retrieved,
            and only by exact computation.
        rounded: whether the keys and values of all tokens are, as by full attention in int8.
    """

    retrieved_share: float | None
    hit_ratio: float | None
    device_bytes: int
    host_bytes: int
    indexed_tokens: int
    audited: int = 0
    error_median: float | None = None
    error_99: float | None = None
    within: float | None = None
    more: float = 0.0
    computed: float = 0.0
    rounded: bool = False


def facts_of(attention: AnyAttention, state: Any) -> Facts:
    """Read the facts off an attention's state; wait for the work that makes it."""
    staged = 0
    if isinstance(state, StagedState):
        staged, state = state.rows.nbytes, state.on_device
    host = sum(x.nbytes for x in jax.tree.leaves(state) if x.sharding.memory_kind == "pinned_host")
    device = sum(x.nbytes for x in jax.tree.leaves(state)) - host
    counts = attention.counts(state)
    if counts is None:
        rounded = attention.row_dtype != "model"
        return Facts(1.0, None, device, host + staged, 0, rounded=rounded)
    retrieved, hits = counts.retrieved, counts.hits
    return Facts(
        retrieved / counts.attended if counts.attended else None,
        hits / retrieved if retrieved and hits is not None else None,
        device,
        host + staged,
        counts.indexed,
        *audit_of(counts.errors),
        *((None, 0.0, 0.0) if counts.tolerance is None else met_by(counts.tolerance)),
    )


def audit_of(errors: Sequence[float] | np.ndarray | None) -> tuple[int, float | None, float | None]:
    """Tell how many errors there are, their median and their 99th percentile."""
    if errors is None or not len(errors):
        return 0, None, None
    return len(errors), float(np.median(errors)), float(np.quantile(errors, 0.99))
