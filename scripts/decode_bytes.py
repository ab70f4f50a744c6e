"""What decode steps had to move: by shapes, and by what the row caches counted."""

import dataclasses
from typing import Any

import numpy as np
from decode_model import memory_of

from models.parameters import Params
from wavejax.attention.dense import DenseState
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveState
from wavejax.engine.staged_state import StagedState, on_device_of
from wavejax.evaluation.cost import wave_step_bytes


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the row caches have counted so far; zeros for full attention.

    Attributes:
        hits, misses: rows, over all layers and sequences.
        attended: rows that full attention would have read.
        indexed: tokens in the index, over all sequences.
    """

    hits: int = 0
    misses: int = 0
    attended: float = 0.0
    indexed: int = 0

    @classmethod
    def of(cls, cache: Any) -> "Counts":
        """Read them off a state; wait for it."""
        cache = on_device_of(cache)
        if not isinstance(cache, WaveState):
            return cls()
        layers, _, kv_heads = cache.store.rows.shape[:3]
        hits, misses = (
            int(np.asarray(x, np.int64).sum())
            for x in (cache.cache.table.hits, cache.cache.table.misses)
        )
        attended = float(np.asarray(cache.attended, np.float64).sum()) * layers * kv_heads
        return cls(hits, misses, attended, int(np.asarray(cache.index.tokens).sum()))

    def since(self, before: "Counts") -> "Counts":
        """Return what was counted between the two."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)
        return Counts(*(after - then for after, then in pairs))

    @property
    def hit_ratio(self) -> float | None:
        """Share of the rows retrieved that the cache held; None where nothing was."""
        retrieved = self.hits + self.misses
        return self.hits / retrieved if retrieved else None


def bytes_of_step(
    params: Params,
    attention: AnyAttention,
    cache: Any,
    counts: Counts,
    steps: int,
) -> dict[str, float]:
    """Bytes that one step must move.

    Args:
        params: the model's; of an embedding only the tokens' rows are read.
        attention: whose state it is.
        cache: the attention's state after the steps.
        counts: what its row caches counted in them.
        steps: how many they were.

    Returns:
        `weights`, `attention` (all else that is read of the device's memory), `missed` (rows that
        were not in the row cache: written to it), `host` (as many, where they come from the host)
        and `device`, the sum of what the device's memory has to do.
    """
    tree = params["params"]
    weights = memory_of(tree) - (tree["embedding"].nbytes if "unembedding" in tree else 0)
    missed, host = 0.0, 0.0
    if isinstance(cache, DenseState):
        layers, _, kv_heads = cache.keys.shape[:3]
        row = cache.keys.row_bytes + cache.values.row_bytes
        # Of the steps' middle.
        tokens = int(np.asarray(cache.tokens).sum()) - len(cache.tokens) * (steps - 1) / 2
        read = layers * kv_heads * row * tokens
    else:
        staged, cache = isinstance(cache, StagedState), on_device_of(cache)
        row = cache.store.rows.row_bytes
        read = _wave_bytes(attention, cache) + row * counts.hits / steps
        missed = row * counts.misses / steps
        if not attention.has_cache:
            # Read where they are, and written nowhere.
            read, missed = read + missed, 0.0
        elif staged or cache.store.rows.data.sharding.memory_kind == "pinned_host":
            host = missed
        else:
            read += missed
    return {
        "weights": float(weights),
        "attention": float(read),
        "missed": missed,
        "host": host,
        "device": float(weights + read + missed),
    }


def _wave_bytes(attention: Any, cache: WaveState) -> float:
    """Bytes that a step of wave attention reads besides the retrieved rows."""
    steady, index = cache.steady, cache.index
    layers, _, kv_heads = cache.store.rows.shape[:3]
    clusters = np.asarray(index.num_clusters, np.float64).mean(axis=(0, 2))
    windows = np.asarray(steady.sink_tokens + steady.window_tokens)
    found = 0.0
    for tokens, *sizes in zip(np.asarray(index.tokens), clusters, windows, strict=True):
        step = wave_step_bytes(attention.config, cache, int(tokens), *sizes)
        found += step.total - step.rows
    return layers * kv_heads * float(found)
