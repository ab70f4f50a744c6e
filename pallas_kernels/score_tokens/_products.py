"""Products of one-bit codes with an int8 query, on the matrix units, by CUDA's assembly.

All vectors here are as long as a program has threads, so Triton gives each thread one element. A
warp's 32 tokens, one a lane, are two left operands of 16 rows. A row comes from the four lanes of a
quad, so these read together the codes of each of their four tokens, a word a lane
(`rows_of_quad`), and get the sums of all four, each lane for its own heads; `_of_own_tokens` gives
each lane its own token's.
"""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.score_tokens._query import PHASES, ROUND
from pallas_kernels.toolbox import launch, warp

# Rows of a left operand that a lane holds: r and r + 8.
ROWS = 2


def rows_of_quad(position: Any, *, emulate: bool) -> list[Any]:
    """Find the positions of the four tokens of each lane's quad: `[threads]` int32 each.

    Args:
        position: `[threads]` int32, each lane's own token's.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    return [warp.from_quad(position, nth, emulate=emulate) for nth in range(warp.QUAD)]


def products(
    words: list[list[Any]], query: list[list[Any]], group: int, *, emulate: bool
) -> list[Any]:
    """Compute the sums of each head's int8 query over the set bits of the lanes' own tokens' codes.

    Args:
        words: for every four words of a code, and each token of the quad, the lane's one of them:
            `[threads]` uint32.
        query: for every eight heads what lanes hold of the right operands: `[threads]` int32
            each, by four words, phase and half, from `_query.pack`.
        group: how many heads there are.
        emulate: in plain JAX instead of CUDA's assembly.

    Returns:
        for each head `[threads]` int32.
    """
    heads: list[Any] = []
    for first, right in zip(range(0, group, ROUND), query, strict=True):
        # The even columns of the product are four heads', the odd ones four more.
        columns = -(-min(group - first, ROUND) // warp.QUAD)
        multiply = _emulated if emulate else _multiply
        tiles = [
            multiply([four[row : row + ROWS] for four in words], right, columns)
            for row in range(0, warp.QUAD, ROWS)
        ]
        for sums in zip(*tiles, strict=True):
            heads += _of_own_tokens(*sums, emulate=emulate)
    return heads[:group]


def _multiply(left: list[list[Any]], right: list[Any], columns: int) -> list[Any]:
    """Both rows' sums of a lane, as two halves of a word, for one or both of its columns.

    Bit k of each byte of a word takes part as it is, so that it weighs 2^k; but bits 4 to 7 are
    shifted to 0 to 3. So phase k = 0 to 3 has four bits of each byte's half, and what the phases
    before gave is doubled for it.

    Args:
        left: by four words of a code, each row's: `[threads]` uint32.
        right: by four words, phase and half: `[threads]` int32.
        columns: how many are asked for.
    """
    words = [word for four in left for word in four]
    lines = [".reg .b32 s<4>, a<4>, low, high;", f".reg .b32 w<{len(words)}>;"]
    lines += [f"mov.b32 s{i}, 0;" for i in range(4)]
    lines += [f"shr.u32 w{i}, ${1 + i}, {PHASES};" for i in range(len(words))]
    needed = [i for i in range(4) if i % ROWS < columns]
    for phase in range(PHASES):
        mask = hex(0x01010101 << phase)
        lines += [f"add.s32 s{i}, s{i}, s{i};" for i in needed if phase]
        for four in range(len(left)):
            for row in range(ROWS):
                word = ROWS * four + row
                lines += [f"and.b32 a{row}, ${1 + word}, {mask};"]
                lines += [f"and.b32 a{2 + row}, w{word}, {mask};"]
            b = 1 + len(words) + 2 * (PHASES * four + phase)
            lines.append(
                "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {s0, s1, s2, s3}, "
                f"{{a0, a1, a2, a3}}, {{${b}, ${b + 1}}}, {{s0, s1, s2, s3}};"
            )
    lines += [f"shr.s32 s{i}, s{i}, {PHASES - 1};" for i in needed]
    lines.append("prmt.b32 low, s0, s2, 0x5410;")
    if columns == 1:
        lines.append("mov.b32 $0, low;")
    else:
        # The assembly has one result.
        lines += ["prmt.b32 high, s1, s3, 0x5410;", "mov.b64 $0, {low, high};"]
    text = "{\n" + "\n".join(lines) + "\n}"
    dtype = jnp.int32 if columns == 1 else jnp.int64
    found = launch.assembly(text, *words, *right, dtype=dtype)
    if columns == 1:
        return [found]
    return [
        launch.assembly(f"{{ .reg .b32 x; mov.b64 {pair}, $1; }}", found, dtype=jnp.int32)
        for pair in ("{$0, x}", "{x, $0}")
    ]


def _emulated(left: list[list[Any]], right: list[Any], columns: int) -> list[Any]:
    """Compute what `_multiply` gives, in plain JAX."""
    sums = [jnp.zeros_like(right[0])] * 4
    for phase in range(PHASES):
        sums = [2 * x for x in sums]
        for four, rows in enumerate(left):
            bits = [
                (lax.shift_right_logical(word, jnp.uint32(shift)) & (0x01010101 << phase))
                for shift in (0, PHASES)
                for word in rows
            ]
            at = 2 * (PHASES * four + phase)
            added = warp.multiply_bytes([x.astype(jnp.int32) for x in bits], right[at : at + 2])
            sums = [x + y for x, y in zip(sums, added, strict=True)]
    sums = [lax.shift_right_arithmetic(x, jnp.int32(PHASES - 1)) for x in sums]
    return [(sums[c] & 0xFFFF) | (sums[2 + c] << 16) for c in range(columns)]


def _of_own_tokens(lower: Any, upper: Any, *, emulate: bool) -> list[Any]:
    """From one head of all of a quad's tokens in each lane to all four heads of the lane's own.

    Args:
        lower, upper: the head's sums of the quad's tokens 0 and 1, and of 2 and 3, as two halves
            of a word: `[threads]` int32.
        emulate: in plain JAX instead of CUDA's assembly.

    Returns:
        the sums of the heads of the quad's lanes 0 to 3, for the lane's own token.
    """
    lane = warp.lanes(lower.shape[0])
    odd, second = (lane & 1) == 1, (lane & 2) == 2
    # Of one of the two tokens, the heads of this lane and of its neighbour.
    lower, upper = (
        warp.join_halves(x, warp.exchange(x, 1, emulate=emulate), odd, emulate=emulate)
        for x in (lower, upper)
    )
    other = warp.exchange(jnp.where(second, lower, upper), 2, emulate=emulate)
    pairs = jnp.where(second, other, lower), jnp.where(second, upper, other)
    return [warp.half(pair, i, emulate=emulate) for pair in pairs for i in range(2)]


def log_sum_exp2(heads: list[Any], *, emulate: bool) -> Any:
    """Compute the natural logarithm of the heads' summed powers of 2: `[n]` float32.

    Args:
        heads: each `[n]` float32.
        emulate: in plain JAX instead of CUDA's assembly, which has powers and logarithms of 2 as
            single instructions where the library takes some twelve for each. They err by 2^-22,
            less than an int8 query.
    """
    peak = functools.reduce(jnp.maximum, heads)
    if len(heads) > 1:
        power = jnp.exp2 if emulate else functools.partial(_approximate, "ex2")
        total = functools.reduce(operator.add, (power(x - peak) for x in heads))
        peak = peak + (jnp.log2(total) if emulate else _approximate("lg2", total))
    return math.log(2) * peak


def multiply_add(x: Any, y: Any, z: Any, *, emulate: bool) -> Any:
    """Compute x * y + z, for `[n]` float32 and numbers, in one instruction: Triton makes it two."""
    if emulate:
        return x * y + z
    y, z = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), x.shape) for a in (y, z))
    return launch.assembly("fma.rn.f32 $0, $1, $2, $3;", x, y, z, dtype=x.dtype)


def _approximate(instruction: str, x: Any) -> Any:
    return launch.assembly(f"{instruction}.approx.ftz.f32 $0, $1;", x, dtype=x.dtype)
