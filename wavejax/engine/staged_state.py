"""The attention state whose rows are staged: all but the rows on the device."""

import dataclasses
from typing import Any

from wavejax.attention.wave import WaveAttention
from wavejax.store.host_rows import HostRows
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True)
class StagedState:
    """The KV cache: on the device all but the rows. No pytree: a program gets `wave` alone.

    Attributes:
        wave: its store has no room.
        rows: the store.
    """

    wave: WaveState
    rows: HostRows


def wave_of(cache: Any) -> Any:
    """A cache without staged rows: what of it is a pytree."""
    return cache.wave if isinstance(cache, StagedState) else cache


def hold_rows(attention: WaveAttention, wave: WaveState) -> StagedState:
    """The state of an empty cache whose rows are staged."""
    rows = wave.store.rows.plain('fetch="staged"')
    layers, batch, kv_heads, _, *row = rows.shape
    room = wave.index.token_ids.shape[-1]
    shape = (layers, batch, kv_heads, room, *row)
    widest = attention.config.most_retrieved(room)
    return StagedState(wave, HostRows(shape, widest, rows.dtype))
