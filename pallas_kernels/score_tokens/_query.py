"""The rotated query in the forms that the kernels multiply codes with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.encode_tokens.reference import rotation
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.warp import LANES, QUAD
from pallas_kernels.types import NO_ID, WORD_BITS, PackedQuery

# How many of a word's bits lie in each of its four bytes.
BYTE = 8

# The kernel multiplies bits 0 to 3 and 4 to 7 of each byte in turn: see `_products`.
PHASES = BYTE // 2

# A right operand has a column for each of so many query heads, and takes so many words of a code.
ROUND, WORDS = 8, QUAD


def packed_shapes(batch: int, kv_heads: int, group: int, head_dim: int) -> PackedQuery:
    """Return the arrays' shapes, as `jax.ShapeDtypeStruct`."""
    rounds, fours = pl.cdiv(group, ROUND), pl.cdiv(head_dim, WORDS * WORD_BITS)
    heads = (batch, kv_heads, group)
    words = (*heads[:2], rounds, fours, PHASES, 2, LANES)
    shapes = (words, jnp.int32), (heads, jnp.float32), (heads, jnp.float32)
    return PackedQuery._make(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def dimensions(head_dim: int, arange: Callable[[int], Any] = jnp.arange) -> list[Any]:
    """List the dimensions of a word's four bytes: four of `[words * 8]`, by word and bit."""
    nth = arange(BYTE * WORDS * pl.cdiv(head_dim, WORDS * WORD_BITS))
    return [WORD_BITS * (nth // BYTE) + BYTE * i + nth % BYTE for i in range(4)]


def write_packed(parts: list[Any], refs: Any, b: Any, h: Any, *, scale: float) -> None:
    """Packs the rotated query of one kv head; all threads of a program together.

    Args:
        parts: of the dimensions of `dimensions` the query, `[16, words * 8]` float32 each; zero
            past the group and the head dim.
        refs: a `PackedQuery` of what is written.
        b, h: sequence and kv head.
        scale: multiplies every product of query and key.
    """
    group, rounds = refs.factors.shape[-1], refs.fragments.shape[2]
    g = jnp.arange(launch.MAX_GROUP)
    largest = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, parts)), axis=1)
    step = jnp.maximum(largest, 1e-30) / 127
    # To the nearest: a conversion alone would cut off what is behind the point.
    whole = [jnp.floor(part / step[:, None] + 0.5).astype(jnp.int32) for part in parts]
    total = jnp.sum(functools.reduce(jnp.add, whole), axis=1)
    packed = functools.reduce(jnp.bitwise_or, ((x & 0xFF) << (8 * i) for i, x in enumerate(whole)))
    nth = jnp.arange(packed.shape[1])
    k, w = nth % BYTE, nth // BYTE
    column = 2 * (g % QUAD) + g % ROUND // QUAD
    lane = QUAD * column[:, None] + (w % WORDS)[None, :]
    exists = g < ROUND * rounds
    r = jnp.where(exists, g // ROUND, NO_ID)[:, None]
    at = (r, (w // WORDS)[None, :], (k % PHASES)[None, :], (k // PHASES)[None, :], lane)
    mask = jnp.broadcast_to(exists[:, None], packed.shape)
    plt.store(refs.fragments.at[b, h, *at], packed, mask=mask)
    unit = (scale * LOG2_E) * step
    head = (b, h, jnp.where(g < group, g, NO_ID))
    plt.store(refs.factors.at[head], 2 * unit, mask=g < group)
    plt.store(refs.shifts.at[head], unit * total.astype(jnp.float32), mask=g < group)


def pack(query: Array, *, scale: float, interpret: bool = False) -> PackedQuery:
    """Packs a rotated query.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        scale: multiplies every product of query and key.
        interpret: see `launch.call`.
    """
    batch, kv_heads, group, head_dim = query.shape

    def kernel(query_ref: Any, packed: PackedQuery) -> None:
        b, h = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
        g = jnp.arange(launch.MAX_GROUP)[:, None]
        parts = []
        for dim in dimensions(head_dim):
            exists = (g < group) & (dim < head_dim)[None, :]
            part = plt.load(query_ref.at[b, h, g, dim[None, :]], mask=exists, other=0)
            parts.append(part.astype(jnp.float32))
        write_packed(parts, packed, b, h, scale=scale)

    [packed] = launch.call(
        kernel,
        (query,),
        (packed_shapes(batch, kv_heads, group, head_dim),),
        (batch * kv_heads,),
        name="pack_query",
        num_warps=4,
        interpret=interpret,
    )
    found: PackedQuery = packed
    return found


def unpack(packed: PackedQuery, head_dim: int, *, scale: float) -> Array:
    """Return the rotated query that was packed, to the int8 that it was rounded to.

    In plain JAX, for GPUs that multiply codes with floats.

    Args:
        packed: of `pack` or `rotate_and_pack`.
        head_dim: of the query.
        scale: what it was packed with.

    Returns:
        `[batch, kv_heads, group, head_dim]` float32.
    """
    fragments, factors, _ = packed
    group = factors.shape[-1]
    rounds, fours = fragments.shape[2:4]
    # Lane 4 n + t holds of column n word t; n is 2 c for head c, and 2 c + 1 for head 4 + c. A
    # word's byte i is dimension k + 8 i of it, by phase k % 4 and half k // 4.
    each = fragments.reshape(*fragments.shape[:-1], QUAD, 2, WORDS)
    shifts = jnp.arange(0, 4 * BYTE, BYTE, dtype=jnp.int32)
    signed = lax.shift_right_arithmetic(
        lax.shift_left(each[..., None], jnp.broadcast_to(24 - shifts, (*each.shape, 4))),
        jnp.int32(24),
    )
    # Axes: batch, kv head, round; head's half, head; four, word, byte, half, phase.
    order = jnp.transpose(signed, (0, 1, 2, 7, 6, 3, 8, 9, 5, 4))
    heads = order.reshape(*order.shape[:2], rounds * ROUND, fours * WORDS * WORD_BITS)
    # A factor is twice the unit of `write_packed`, in binary logarithms.
    step = factors / (2 * scale * LOG2_E)
    return heads[:, :, :group, :head_dim].astype(jnp.float32) * step[..., None]


@functools.cache
def rotations(head_dim: int) -> np.ndarray:
    """Sort the rotation's rows by the bytes that they end in.

    Returns:
        `[2, 4, head_dim, words * 8]` bfloat16: a sum of two parts, which hold 16 bits of a float32.
    """
    matrix, tables = rotation(head_dim), []
    for dim in dimensions(head_dim, np.arange):
        rows = matrix[np.minimum(dim, head_dim - 1)]
        tables.append(np.where(dim[:, None] < head_dim, rows, 0).T)
    exact = np.stack(tables)
    first = exact.astype(jnp.bfloat16)
    return np.stack([first, (exact - first.astype(np.float32)).astype(jnp.bfloat16)])


def rotate_and_pack(
    query_ref: Any, rotations_ref: Any, refs: PackedQuery, b: Any, h: Any, *, scale: float
) -> None:
    """Rotates and packs the query of one kv head; all threads of a program together.

    Args:
        query_ref: `[batch, kv_heads, group, head_dim]` bfloat16 or float16.
        rotations_ref: `rotations`.
        refs: a `PackedQuery` of what is written.
        b, h: sequence and kv head.
        scale: multiplies every product of query and key.
    """
    group, head_dim = query_ref.shape[2:]
    g, d = jnp.arange(launch.MAX_GROUP)[:, None], jnp.arange(launch.tile(head_dim))
    exists = (g < group) & (d < head_dim)[None, :]
    query = plt.load(query_ref.at[b, h, g, d[None, :]], mask=exists, other=0)
    halves = [query]
    if query.dtype != jnp.bfloat16:
        halves = _halves(query)
    n = jnp.arange(rotations_ref.shape[-1])[None, :]
    mask = jnp.broadcast_to((d < head_dim)[:, None], (d.size, n.size))
    parts = []
    for i in range(4):
        tables = [
            plt.load(
                rotations_ref.at[jnp.int32(j), jnp.int32(i), d[:, None], n], mask=mask, other=0
            )
            for j in range(2)
        ]
        products = (launch.dot(half, table) for table in tables for half in halves)
        parts.append(functools.reduce(jnp.add, products))
    write_packed(parts, refs, b, h, scale=scale)


def _halves(query: Any) -> list[Any]:
    """Return two bfloat16 whose sum a float16 is: in a kernel, where none is rounded away."""
    exact = query.astype(jnp.float32)
    # The upper half of the bits is a bfloat16 as it is; XLA could drop a cast and its way back.
    upper = lax.bitcast_convert_type(exact, jnp.uint32) & jnp.uint32(0xFFFF0000)
    first = lax.bitcast_convert_type(upper, jnp.float32)
    return [first.astype(jnp.bfloat16), (exact - first).astype(jnp.bfloat16)]


def split(query: Array) -> Array:
    """Split the query into bfloat16 parts: `[batch, kv_heads, parts, group, head_dim]`.

    It is their sum. Three of them hold all bits of a float32, one those of a bfloat16.
    """
    parts = {"bfloat16": 1, "float16": 2}.get(query.dtype.name, 3)
    return jnp.stack(launch.split_bfloat16(query.astype(jnp.float32), parts), axis=2)
