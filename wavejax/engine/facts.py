"""What a generation cost and used: the line of facts."""

import dataclasses

import jax
import numpy as np

from wavejax.attention.dense import DenseState
from wavejax.engine.staged_state import StagedState
from wavejax.store.state import WaveState


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
    """

    retrieved_share: float | None
    hit_ratio: float | None
    device_bytes: int
    host_bytes: int
    indexed_tokens: int


def facts_of(state: WaveState | StagedState | DenseState) -> Facts:
    """Reads the facts off a state; waits for the work that makes it."""
    staged = 0
    if isinstance(state, StagedState):
        staged, state = state.rows.nbytes, state.wave
    host = sum(x.nbytes for x in jax.tree.leaves(state) if x.sharding.memory_kind == "pinned_host")
    device = sum(x.nbytes for x in jax.tree.leaves(state)) - host
    if isinstance(state, DenseState):
        return Facts(1.0, None, device, host, 0)
    table = state.cache.table
    hits, misses = (int(np.asarray(x, np.int64).sum()) for x in (table.hits, table.misses))
    retrieved, slots = hits + misses, table.token_of_slot.shape[-1]
    layers, _, kv_heads = state.store.rows.shape[:3]
    attended = float(np.asarray(state.attended, np.float64).sum()) * layers * kv_heads
    return Facts(
        retrieved / attended if attended else None,
        hits / retrieved if retrieved and slots else None,
        device,
        host + staged,
        int(np.asarray(state.index.tokens, np.int64).sum()),
    )
