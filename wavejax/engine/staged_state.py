"""The attention state whose rows are staged: all but the rows on the device."""

import dataclasses
from typing import Any

from wavejax.attention.wave import WaveAttention
from wavejax.store.host_rows import HostRows
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True)
class StagedState:
    """The KV cache: on the device all but the rows. No pytree: a program gets `on_device` alone.

    Attributes:
        on_device: the state whose store has no room, but for scales if rows have any.
        rows: the store.
    """

    on_device: WaveState
    rows: HostRows


def on_device_of(cache: Any) -> Any:
    """Return a cache without staged rows: what of it is a pytree."""
    return cache.on_device if isinstance(cache, StagedState) else cache


def with_device_part(cache: Any, on_device: Any) -> Any:
    """Return a cache with another device part, and its own staged rows if it has any."""
    return StagedState(on_device, cache.rows) if isinstance(cache, StagedState) else on_device


def hold_rows(attention: WaveAttention, empty: WaveState) -> StagedState:
    """Return the state of an empty cache whose rows are staged."""
    rows = empty.store.rows
    layers, batch, kv_heads, _, *row = rows.shape
    room = empty.index.token_ids.shape[-1]
    shape = (layers, batch, kv_heads, room, *row)
    widest = attention.config.most_retrieved(room)
    return StagedState(empty, HostRows(shape, widest, rows.dtype))
