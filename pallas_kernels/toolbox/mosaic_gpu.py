"""What the kernels by Mosaic GPU share: whom they serve, tiles, and the window of query heads."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import backend
from pallas_kernels import mosaic_gpu_route as route
from pallas_kernels.toolbox import launch

# Rows that the warpgroup's products take at once, and columns.
ROWS, COLUMNS = 64, 8

# Rows of a tile in shared memory: copies by the TMA begin at a multiple of it.
TILE_ROWS = 8

# The shared memory that a program may have on Hopper.
SHARED_BYTES = 227 * 1024


class Window(NamedTuple):
    """The queries as the copies to shared memory take them: by eights or sixteens of heads.

    A row's heads lie in one window, from `first` on; the window's other heads are other rows'.

    Attributes:
        queries: `[heads, head_dim]`.
        heads: of a window, 8 or 16.
        padded: heads of a row, with those that were added to make windows of them.
    """

    queries: Array
    heads: int
    padded: int


def window(query: Array) -> Window:
    """Make windows of `[batch, kv_heads, group, head_dim]`: a copy only if the group wants one."""
    batch, kv_heads, group, head_dim = query.shape
    heads = COLUMNS if group <= COLUMNS else 2 * COLUMNS
    padded = group if not heads % group and not batch * kv_heads * group % heads else heads
    rows = query.reshape(batch * kv_heads, group, head_dim)
    if padded != group:
        rows = jnp.pad(rows, ((0, 0), (0, padded - group), (0, 0)))
    return Window(rows.reshape(-1, head_dim), heads, padded)


def place_in(heads: int, padded: int, row: Any) -> tuple[Any, Any]:
    """Find the first head of a row's window, and the row's first head in it."""
    head = row * padded
    first = lax.rem(head, jnp.int32(heads))
    return head - first, first


def swizzled(head_dim: int) -> tuple[Any, ...]:
    """Return how vectors of 16-bit numbers lie in shared memory, so that products take them."""
    mgpu = route.api()
    swizzle = 128 if head_dim % 64 == 0 else 64
    return mgpu.TilingTransform((TILE_ROWS, swizzle // 2)), mgpu.SwizzleTransform(swizzle)


def check(op: str, group: int, head_dim: int, *dtypes: Any) -> None:
    """Raise NotImplementedError for heads, dtypes and GPUs that the kernels are not made for."""
    launch.check_heads(op, group, head_dim, *dtypes)
    for dtype in dtypes:
        if dtype != dtypes[0] or dtype == jnp.float32:
            names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise NotImplementedError(
                f"{op}: dtypes are {names}; the Mosaic GPU kernel wants one 16-bit dtype, bfloat16 "
                "or float16"
            )
    capability = launch.compute_capability()
    if capability is not None and capability[0] != 9:
        has = ".".join(map(str, capability))
        raise NotImplementedError(
            f"{op}: the GPU has compute capability {has}; the Mosaic GPU kernel wants Hopper, 9.0"
        )
    if not backend.takes_assembly():
        raise NotImplementedError(f"{op}: the Mosaic GPU kernel wants a GPU of NVIDIA's, Hopper")


def check_room(op: str, name: str, room: int, least: int) -> None:
    """Raise NotImplementedError for rows of vectors that copies by the TMA do not reach."""
    if room < least or room % TILE_ROWS:
        raise NotImplementedError(
            f"{op}: there is room for {room} {name}; the Mosaic GPU kernel wants at least {least}, "
            f"and a multiple of {TILE_ROWS}"
        )
