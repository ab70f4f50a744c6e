"""KV rows, a token's key and value for one kv head: the row store, and the row cache before it."""

import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Num

import pallas_kernels as ops
from pallas_kernels.append_rows.reference import write
from pallas_kernels.rounding import quantise
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.types import EMPTY, Rows, RowTable
from wavejax._pytree import state
from wavejax.store.shape import ROW, STACK

StoreKind = Literal["host", "device"]
Fetch = Literal["in_place", "staged"]


def best_fetch() -> Fetch:
    """How rows in host memory reach the platform's device; starts it.

    Kernels of GPUs read pinned host memory in place; on a CPU there is but one memory.
    """
    return "in_place" if jax.default_backend() in ("cpu", "gpu") else "staged"


def _axes_of_rows(places: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the axes of `Rows`, which lie at `places`."""
    return {"data": (*STACK, places, *ROW), "scales": (*STACK, places, "key_value")}


@state
class RowStore:
    """All indexed tokens' KV rows, by store row: a token's position less the sinks.

    Attributes:
        rows: `[layers, batch, kv_heads, tokens, 2, head_dim]`, with their format; in `pinned_host`
            memory or on the device. Of staged rows only the scales are here, if they have any.
    """

    rows: Rows

    AXES: ClassVar = {"rows": _axes_of_rows("tokens")}


@state
class RowCache:
    """KV rows of the store that were retrieved lately, on the device, by slot.

    It has no slots where the store is on the device too, unless asked for.

    Attributes:
        rows: `[layers, batch, kv_heads, slots, 2, head_dim]`, with their format.
        table: the store row that each slot holds (`pallas_kernels.RowTable`).
    """

    rows: Rows
    table: RowTable

    AXES: ClassVar = {
        "rows": _axes_of_rows("slots"),
        "table": {
            "slot_of_token": (*STACK, "tokens"),
            "token_of_slot": (*STACK, "slots"),
            "last_used": (*STACK, "slots"),
            "hits": STACK,
            "misses": STACK,
        },
    }


def dtype_of(choice: str, dtype: DTypeLike) -> np.dtype:
    """Return the dtype that rows are kept in.

    Args:
        choice: "model", the model's own, or "int8", with scales.
        dtype: the model's own.
    """
    return jnp.dtype(dtype if choice == "model" else choice)


def init_store(
    shape: tuple[int, ...], dtype: DTypeLike, kind: StoreKind, *, staged: bool = False
) -> RowStore:
    """Make an empty store of shape `[layers, batch, kv_heads, tokens, 2, head_dim]`.

    A GPU's store in host memory holds anything until its rows are written.

    Args:
        shape: of the rows.
        dtype: of the rows; int8 for rows with scales.
        kind: where they are.
        staged: whether the host holds the rows: here is then room for their scales alone.
    """
    if not staged:
        shape = addressable(shape, dtype)
    scales = _init_scales(shape, dtype)
    if staged:
        shape, kind = (*shape[:3], 0, *shape[4:]), "device"
    if kind == "device":
        return RowStore(Rows(jnp.zeros(shape, dtype), scales))
    return RowStore(Rows(_in_host_memory(shape, jnp.dtype(dtype)), scales))


def init_rows(shape: tuple[int, ...], dtype: DTypeLike) -> Rows:
    """Make rows of zeros on the device: of int8 with scales, of other dtypes plain ones.

    Args:
        shape: `[layers, batch, kv_heads, tokens, ...]`; see `addressable`.
        dtype: of the rows.
    """
    shape = addressable(shape, dtype)
    return Rows(jnp.zeros(shape, dtype), _init_scales(shape, dtype))


def addressable(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, ...]:
    """Make room for more tokens where a kernel's pointers would not reach the last of them.

    Of arrays of numbers of one byte they reach up to 2^31, or, counted in 64 bits, more than 2^32
    (`pallas_kernels.toolbox.launch.check_addressable`): what is between gets more than 2^32.

    Args:
        shape: `[layers, batch, kv_heads, tokens, ...]`.
        dtype: of the rows.
    """
    size = math.prod(shape)
    if jnp.dtype(dtype).itemsize > 1 or not 2**31 < size <= 2**32:
        return shape
    tokens = 2**32 // (size // shape[3]) + 1
    return (*shape[:3], tokens, *shape[4:])


def _init_scales(shape: tuple[int, ...], dtype: DTypeLike) -> Array | None:
    """Make the scales of rows of int8, on the device; None for others."""
    return jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_host_memory(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Make an array in host memory that is written to nowhere but in its first row.

    Of zeros that are moved to host memory and updated there, XLA makes but room on a GPU. Without
    the update it would make the zeros on the device, which may not have the room; and to copy them
    from numpy takes longer than to write a prompt's rows (docs/lab/benchmarks.md).
    """
    host = jax.memory.Space.Host
    first = jnp.zeros((*(1 for _ in shape[:-2]), *shape[-2:]), dtype)
    store, first = jax.device_put((jnp.zeros(shape, dtype), first), host)
    return lax.dynamic_update_slice(store, first, (0,) * len(shape))


def init_cache(shape: tuple[int, ...], tokens: int, dtype: DTypeLike) -> RowCache:
    """Make an empty cache of shape `[layers, batch, kv_heads, slots, 2, head_dim]`.

    Args:
        shape: of the rows.
        tokens: room in the store.
        dtype: of the rows; int8 for rows with scales.
    """
    layers, batch, kv_heads, slots = shape[:4]
    table = empty_table((layers, batch, kv_heads), tokens, slots)
    return RowCache(init_rows(shape, dtype), table)


def append_rows(
    store: RowStore,
    rows: Float[Array, "kv_heads new 2 head_dim"],
    layer: Int[Array, ""] | int,
    sequence: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
) -> RowStore:
    """Write one sequence's new rows, rounded as the store holds them: see `ops.append_rows`.

    Of staged rows only the scales are written, if they have any; `held_on_host` makes the rest.
    """
    held = store.rows
    if held.shape[3]:
        return RowStore(ops.append_rows(held, rows, layer, sequence, start))
    new = quantise(rows).scales
    if held.scales is None or new is None or not rows.shape[1]:
        return store
    return RowStore(Rows(held.data, write(held.scales, new, layer, sequence, start)))


def held_on_host(
    rows: Float[Array, "*rows 2 head_dim"], dtype: DTypeLike
) -> Num[Array, "*rows 2 head_dim"]:
    """Return what the host holds of staged rows: their numbers, or their levels in int8."""
    return quantise(rows).data if jnp.dtype(dtype) == jnp.int8 else rows.astype(dtype)


def as_rows(
    keys: Float[Array, "... head_dim"], values: Float[Array, "... head_dim"]
) -> Float[Array, "... 2 head_dim"]:
    """Put keys and values side by side."""
    return jnp.stack([keys, values], axis=-2)


def forget(cache: RowCache, sequence: Int[Array, ""]) -> RowCache:
    """Empty one sequence's slots, for another prompt to take its place."""
    *places, hits, misses = cache.table
    counts = (counter.at[:, sequence].set(0) for counter in (hits, misses))
    return RowCache(
        cache.rows, RowTable(*(field.at[:, sequence].set(EMPTY) for field in places), *counts)
    )
