"""`append_rows` as one Pallas (Triton) kernel, which writes over PCIe as fast as a copy does."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.append_rows.reference import write
from pallas_kernels.rounding import quantise
from pallas_kernels.toolbox import launch
from pallas_kernels.types import Rows

# So many programs fill the bus, with room to spare; where rows are few, so many share them.
PROGRAMS = 128
# The longest run of one program. What runs at a time then writes to few of the host's pages.
RUN_BYTES = 128 * 1024
# Copied at once: 64 bytes a thread of four warps.
TILE_BYTES = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        tokens: rows of one head, one after the other, that are one program's.
        tile: numbers that a program copies at once; a power of two. It should divide a program's.
        num_warps: see Triton.
    """

    tokens: int
    tile: int
    num_warps: int = 4


def heuristic(kv_heads: int, new: int, head_dim: int, itemsize: int) -> Config:
    """Run of `RUN_BYTES`, or shorter ones where that would leave programs without any.

    Args:
        kv_heads, new: heads, and rows of each.
        head_dim, itemsize: of the store's rows.
    """
    tile, row = TILE_BYTES // itemsize, 2 * head_dim
    least = tile // math.gcd(tile, row)  # rows that are whole tiles
    longest = RUN_BYTES // (row * itemsize * least)
    share = math.ceil(kv_heads * new / (PROGRAMS * least))
    return Config(least * max(1, min(longest, share)), tile)


# Also by itself, outside a program, the result is then given as one in host memory.
@functools.partial(jax.jit, static_argnames=("config", "interpret"), inline=True)
def append_rows(
    store: Rows,
    rows: Array,
    layer: Array | int,
    sequence: Array | int,
    start: Array | int,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Rows:
    """See `pallas_kernels.append_rows`. What would pass the store's end is not written.

    Raises:
        NotImplementedError: see `launch.check_heads`; or there are no rows, or more than fit.
    """
    data, scales = store
    kv_heads, new, _, head_dim = rows.shape
    if scales is not None:
        rows, new_scales = quantise(rows)
        assert new_scales is not None
        # On the device, where XLA does well.
        scales = write(scales, new_scales, layer, sequence, start)
    # Levels are copied as they are.
    floats = () if data.dtype == rows.dtype == jnp.int8 else (data.dtype, rows.dtype)
    launch.check_heads("append_rows", 1, head_dim, *floats)
    if not 0 < new <= data.shape[3]:
        raise NotImplementedError(
            f"append_rows: {new} rows for a store of {data.shape[3]}; the kernel wants 1 or more, "
            "and room for them"
        )
    config = config or heuristic(kv_heads, new, head_dim, data.dtype.itemsize)
    # One result and no tuple: XLA takes it to be where its operand is only then.
    written = launch.call(
        functools.partial(_kernel, config=config),
        (data, rows, *(launch.scalar(i) for i in (layer, sequence, start))),
        jax.ShapeDtypeStruct(data.shape, data.dtype),
        (pl.cdiv(new, config.tokens), kv_heads),
        name="append_rows",
        num_warps=config.num_warps,
        # No loads into shared memory ahead: other programs hide the time that they take.
        num_stages=1,
        aliases={0: 0},
        interpret=interpret,
    )
    if jax.typeof(data).memory_space == jax.memory.Space.Host:
        # Pallas says of all results that they are on the device. This one's buffer is the
        # operand's, which XLA follows from the program's input on: it drops the transfer.
        written = jax.device_put(written, jax.memory.Space.Host)
    return Rows(written, scales)


def _kernel(
    _: Any,
    rows_ref: Any,
    layer_ref: Any,
    sequence_ref: Any,
    start_ref: Any,
    store_ref: Any,
    *,
    config: Config,
) -> None:
    """Copy a run of one head's rows, which lie as closely in the store as they are given."""
    new, head_dim = rows_ref.shape[1], rows_ref.shape[3]
    head, first, start = pl.program_id(1), pl.program_id(0) * config.tokens, start_ref[...]
    to = layer_ref[...], sequence_ref[...], head
    end = jnp.minimum(jnp.minimum(first + config.tokens, new), store_ref.shape[3] - start)

    def copy(i: Any, _: None) -> None:
        # Counted from the program's first row, so that no number is too large for 32 bits.
        number = i * config.tile + jnp.arange(config.tile)
        # Not by // and %: what they do about signs hides from Triton which numbers lie together.
        row = first + lax.div(number, 2 * head_dim)
        kv, d = lax.rem(lax.div(number, head_dim), 2), lax.rem(number, head_dim)
        mask = row < end
        values = plt.load(rows_ref.at[head, row, kv, d], mask=mask, other=0)
        if values.dtype != store_ref.dtype:
            # By way of float32: neither of the 16-bit types holds the other.
            values = values.astype(jnp.float32).astype(store_ref.dtype)
        plt.store(store_ref.at[*to, start + row, kv, d], values, mask=mask)

    tiles = pl.cdiv(config.tokens * 2 * head_dim, config.tile)
    lax.fori_loop(0, tiles, copy, None)
