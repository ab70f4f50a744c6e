"""What the lanes of a warp do together, by CUDA's assembly; for tests also in plain JAX.

All vectors here are as long as a program has threads, so Triton gives each thread one element.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.toolbox import launch

# A warp's threads; four that follow each other share a row of a matrix.
LANES, QUAD = 32, 4

# How prmt picks the four bytes of a word, the lowest one last: 0 to 3 are x's, 4 to 7 y's, and 8
# more than a number repeats that byte's sign. Both lower halves, y's above; the upper ones, x's
# above; the lower half or the upper one alone, with its sign.
LOWER_HALVES, UPPER_HALVES = 0x5410, 0x3276
SIGNED_HALVES = "0x9910", "0xbb32"


def lanes(threads: int) -> Any:
    """Each thread's number in its warp: `[threads]` int32."""
    return jnp.arange(threads) % LANES


def from_lane(x: Any, lane: Any) -> Any:
    """Read what the warp's lane of that number has: `[threads]` int32, as x and `lane`."""
    shuffle = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return launch.assembly(shuffle, x, lane, dtype=jnp.int32)


def from_quad(x: Any, nth: int, *, emulate: bool) -> Any:
    """Read what the nth lane of each lane's quad has: `[threads]` int32."""
    if emulate:
        return jnp.repeat(x.reshape(-1, QUAD)[:, nth], QUAD)
    # The segment's mask keeps the quad's number, and lanes are clamped to it.
    clamp = (LANES - QUAD) << 8 | (LANES - 1)
    text = f"shfl.sync.idx.b32 $0, $1, {nth}, {clamp}, 0xffffffff;"
    return launch.assembly(text, x, dtype=jnp.int32)


def exchange(x: Any, distance: int, *, emulate: bool) -> Any:
    """Read what the lane has whose number differs by one bit, the one that is worth `distance`."""
    if emulate:
        return jnp.flip(x.reshape(-1, 2, distance), axis=1).reshape(x.shape)
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, {LANES - 1}, 0xffffffff;"
    return launch.assembly(text, x, dtype=jnp.int32)


def join_halves(x: Any, y: Any, upper: Any, *, emulate: bool) -> Any:
    """Put the lower halves of x and y in one word; or, in `upper` lanes, the upper ones of y and x.

    Args:
        x, y: `[threads]` int32.
        upper: `[threads]` bool.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    if emulate:
        ones = jnp.int32(0xFFFF)
        low = (x & ones) | (y << 16)
        return jnp.where(upper, lax.shift_right_logical(y, jnp.int32(16)) | (x & ~ones), low)
    selector = jnp.where(upper, jnp.int32(UPPER_HALVES), jnp.int32(LOWER_HALVES))
    return launch.assembly("prmt.b32 $0, $1, $2, $3;", x, y, selector, dtype=jnp.int32)


def half(x: Any, nth: int, *, emulate: bool) -> Any:
    """Return the lower or the upper half of a word, with its sign: `[threads]` int32."""
    if emulate:
        return lax.shift_right_arithmetic(x << (16 * (1 - nth)), jnp.int32(16))
    return launch.assembly(f"prmt.b32 $0, $1, 0, {SIGNED_HALVES[nth]};", x, dtype=jnp.int32)


def after(x: Any, read: list[Any]) -> Any:
    """Return x, but not before all that is read is there, so that no load waits for another.

    Left to itself, CUDA's compiler loads late, to save registers, and waits for each load in turn.

    Args:
        x: `[threads]` int32.
        read: `[threads]` of 32 bits each.
    """
    read = [y if y.dtype != jnp.float32 else lax.bitcast_convert_type(y, jnp.int32) for y in read]
    lines = ["mov.b32 seen, 1;"]
    lines += [f"or.b32 seen, seen, ${2 + i};" for i in range(len(read))]
    # 1, whatever was read, but that the compiler does not find out.
    lines += ["min.u32 seen, seen, 1;", "sub.u32 seen, seen, 1;", "add.s32 $0, $1, seen;"]
    text = "{ .reg .b32 seen; " + " ".join(lines) + " }"
    return launch.assembly(text, x, *read, dtype=jnp.int32)


def multiply_bytes(left: list[Any], right: list[Any]) -> list[Any]:
    """One product of the matrix units, m16n8k32, in plain JAX: rows of bytes by columns of int8.

    By the layout in CUDA's documentation: lane 4 g + t holds of rows g and g + 8 of the left
    operand columns 4 t to 4 t + 3 and 16 to 19 more, of column g of the right one these rows, and
    of the result rows g and g + 8 of columns 2 t and 2 t + 1.

    Args:
        left: lower columns of rows g and g + 8, then the upper ones: `[threads]` int32 each.
        right: lower rows, then upper ones: the same.

    Returns:
        row g's two columns, then row g + 8's: `[threads]` int32 each.
    """

    def unpack(word: Any, signed: bool) -> Any:
        """Return the four bytes of each word, the lowest first: `[warps, 8, 16]` int32."""
        shift = jnp.arange(0, 32, 8, dtype=jnp.int32)
        each = lax.shift_right_logical(word[:, None], jnp.broadcast_to(shift, (*word.shape, 4)))
        each = each & 0xFF
        each = jnp.where(signed & (each > 127), each - 256, each)
        return each.reshape(-1, LANES // QUAD, 4 * QUAD)

    columns = jnp.concatenate([unpack(x, True) for x in right], axis=-1)
    found = []
    for row in range(2):
        rows = jnp.concatenate([unpack(x, False) for x in left[row::2]], axis=-1)
        product = jnp.einsum("wrk,wck->wrc", rows, columns).reshape(-1, 2)
        found += [product[:, 0], product[:, 1]]
    return found
