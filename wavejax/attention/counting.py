"""What decode steps have read so far, of wave attention's state."""

import numpy as np

from wavejax.attention.protocol import Counts
from wavejax.store.audit import errors_of
from wavejax.store.state import WaveState
from wavejax.store.tolerance import shares_of


def counts(state: WaveState) -> Counts:
    """Read what decode steps have retrieved so far; see `Attention.counts`."""
    table = state.cache.table
    hits, misses = (int(np.asarray(x, np.int64).sum()) for x in (table.hits, table.misses))
    layers, _, kv_heads = state.store.rows.shape[:3]
    attended = float(np.asarray(state.attended, np.float64).sum()) * layers * kv_heads
    indexed = int(np.asarray(state.index.tokens, np.int64).sum())
    has_slots = table.token_of_slot.shape[-1] > 0
    errors = None if state.audit is None else errors_of(state.audit)
    shares = None if state.tolerance is None else shares_of(state.tolerance)
    return Counts(hits + misses, hits if has_slots else None, attended, indexed, errors, shares)
