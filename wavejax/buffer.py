"""The wave buffer: where the rows (a token's key and value for one kv head) of all zones lie."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.select_tokens import RowTable, empty_table
from wavejax._pytree import state

StoreKind = Literal["host", "device"]
Fetch = Literal["in_place", "staged"]


def best_fetch() -> Fetch:
    """How rows in host memory reach the platform's device; starts it.

    Kernels of GPUs read pinned host memory in place; on a CPU there is but one memory.
    """
    return "in_place" if jax.default_backend() in ("cpu", "gpu") else "staged"


@state
class RowStore:
    """All indexed tokens' rows, in token order.

    Attributes:
        rows: `[layers, batch, kv_heads, tokens, 2, head_dim]`, key and value side by side; in
            `pinned_host` memory or on the device.
    """

    rows: Array


@state
class RowCache:
    """Rows of the store that were retrieved lately, on the device; no slots if it is there itself.

    Attributes:
        rows: `[layers, batch, kv_heads, slots, 2, head_dim]`.
        table: which row each slot holds (`pallas_kernels.select_tokens.RowTable`).
    """

    rows: Array
    table: RowTable


@state
class SteadyZone:
    """The rows that are always attended to exactly, on the device.

    Attributes:
        sink: `[layers, batch, kv_heads, sink_tokens, 2, head_dim]`, the first tokens.
        sink_tokens: `[batch]` int32, how many there are.
        window: `[layers, batch, kv_heads, window, 2, head_dim]`, the tokens after the indexed
            ones, oldest first.
        window_tokens: `[batch]` int32, how many there are.
    """

    sink: Array
    sink_tokens: Array
    window: Array
    window_tokens: Array


def init_store(shape: tuple[int, ...], dtype: DTypeLike, kind: StoreKind) -> RowStore:
    """An empty store of shape `[layers, batch, kv_heads, tokens, 2, head_dim]`.

    A GPU's store in host memory holds anything until its rows are written.
    """
    if kind == "device":
        return RowStore(jnp.zeros(shape, dtype))
    return RowStore(_in_host_memory(shape, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_host_memory(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """An array in host memory that is written to nowhere but in its first row.

    Of zeros that are moved to host memory and updated there, XLA makes but room on a GPU. Without
    the update it would make the zeros on the device, which may not have the room; and to copy them
    from numpy takes longer than to write a prompt's rows (docs/benchmarks.md).
    """
    host = jax.memory.Space.Host
    first = jnp.zeros((*(1 for _ in shape[:-2]), *shape[-2:]), dtype)
    store, first = jax.device_put((jnp.zeros(shape, dtype), first), host)
    return lax.dynamic_update_slice(store, first, (0,) * len(shape))


def init_cache(shape: tuple[int, ...], tokens: int, dtype: DTypeLike) -> RowCache:
    """An empty cache of shape `[layers, batch, kv_heads, slots, 2, head_dim]`."""
    layers, batch, kv_heads, slots = shape[:4]
    table = empty_table((layers, batch, kv_heads), tokens, slots)
    return RowCache(jnp.zeros(shape, dtype), table)


def init_steady(
    row: tuple[int, int, int], sinks: int, window: int, head_dim: int, dtype: DTypeLike
) -> SteadyZone:
    """An empty steady zone; `row` is (layers, batch, kv_heads)."""
    return SteadyZone(
        sink=jnp.zeros((*row, sinks, 2, head_dim), dtype),
        sink_tokens=jnp.zeros(row[1], jnp.int32),
        window=jnp.zeros((*row, window, 2, head_dim), dtype),
        window_tokens=jnp.zeros(row[1], jnp.int32),
    )


def as_rows(
    keys: Float[Array, "... head_dim"], values: Float[Array, "... head_dim"]
) -> Float[Array, "... 2 head_dim"]:
    """Puts keys and values side by side."""
    return jnp.stack([keys, values], axis=-2)


def fill_steady(
    steady: SteadyZone,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    rows: Float[Array, "kv_heads tokens 2 head_dim"],
    window_start: Int[Array, ""],
) -> SteadyZone:
    """Writes a prompt's first rows and those from `window_start` on, in one layer."""
    sinks, window = steady.sink.shape[3], steady.window.shape[3]
    padded = jnp.pad(rows, ((0, 0), (0, max(sinks, window)), (0, 0), (0, 0)))
    tail = lax.dynamic_slice_in_dim(padded, window_start, window, axis=1)
    dtype = steady.sink.dtype
    return SteadyZone(
        sink=steady.sink.at[layer, sequence].set(padded[:, :sinks].astype(dtype)),
        sink_tokens=steady.sink_tokens,
        window=steady.window.at[layer, sequence].set(tail.astype(dtype)),
        window_tokens=steady.window_tokens,
    )


def push_rows(
    steady: SteadyZone,
    layer: Int[Array, ""] | int,
    rows: Float[Array, "batch kv_heads 2 head_dim"],
) -> SteadyZone:
    """Writes each sequence's newest row at its window's end. Does not move `window_tokens`."""
    batch, kv_heads = rows.shape[:2]
    b, h = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :]
    window = steady.window.at[layer, b, h, steady.window_tokens[:, None]].set(
        rows.astype(steady.window.dtype)
    )
    return SteadyZone(steady.sink, steady.sink_tokens, window, steady.window_tokens)


def forget(cache: RowCache, sequence: Int[Array, ""]) -> RowCache:
    """Empties one sequence's slots, for another prompt to take its place."""
    *places, hits, misses = cache.table
    counts = (counter.at[:, sequence].set(0) for counter in (hits, misses))
    return RowCache(
        cache.rows, RowTable(*(field.at[:, sequence].set(-1) for field in places), *counts)
    )
