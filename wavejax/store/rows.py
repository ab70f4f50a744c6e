"""KV rows, a token's key and value for one kv head: the row store, and the row cache before it."""

import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

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
            memory or on the device.
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


def init_store(shape: tuple[int, ...], dtype: DTypeLike, kind: StoreKind) -> RowStore:
    """Make an empty store of shape `[layers, batch, kv_heads, tokens, 2, head_dim]`.

    A GPU's store in host memory holds anything until its rows are written.
    """
    if kind == "device":
        return RowStore(Rows(jnp.zeros(shape, dtype)))
    return RowStore(Rows(_in_host_memory(shape, jnp.dtype(dtype))))


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
    """Make an empty cache of shape `[layers, batch, kv_heads, slots, 2, head_dim]`."""
    layers, batch, kv_heads, slots = shape[:4]
    table = empty_table((layers, batch, kv_heads), tokens, slots)
    return RowCache(Rows(jnp.zeros(shape, dtype)), table)


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
