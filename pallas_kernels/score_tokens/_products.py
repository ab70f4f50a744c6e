"""Products of one-bit codes with an int8 query, on the matrix units, by CUDA's assembly.

All vectors here are as long as a program has threads, so Triton gives each thread one element.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _pallas
from pallas_kernels.score_tokens._query import BYTE, LANES, PHASES

# load(lane, pair, phase, word, half): what lanes hold of the right operand, from `_query.pack`.
Load = Callable[..., Any]


def products(words: list[list[Any]], load: Load, pairs: int) -> list[list[Any]]:
    """The sums of each head's int8 query over the set bits of codes.

    Args:
        words: for an even number of slices the words of their codes: each `[threads]` uint32.
        load: reads the query.
        pairs: of query heads.

    Returns:
        for each slice 2 * pairs sums: each `[threads]` int32.
    """
    size, threads = len(words[0]), words[0][0].shape[0]
    lane = jnp.arange(threads) % LANES
    # By slice pair and head pair. In two parts, or the query alone would take 64 registers.
    sums: dict[tuple[int, int], Any] = {}
    for phases in (range(PHASES // 2), range(PHASES // 2, PHASES)):
        steps = [(p, w, half) for p in phases for w in range(size) for half in range(2)]
        if sums:
            lane = _after(lane, sums[len(words) - 2, pairs - 1])
        right = [[load(lane, pair, *step) for step in steps] for pair in range(pairs)]
        for s in range(0, len(words), 2):
            left = [_bits(words[i][w], p, half) for p, w, half in steps for i in (s, s + 1)]
            for pair, of_pair in enumerate(right):
                sums[s, pair] = _multiply(sums.get((s, pair)), left, of_pair, phases, size)
    return [
        [_part(sums[s - s % 2, g // 2], 2 * (s % 2) + g % 2) for g in range(2 * pairs)]
        for s in range(len(words))
    ]


def _bits(word: Any, phase: int, half: int) -> Any:
    """A bit of each byte of a word: bit phase + 4 half, which weighs 2^phase in the result.

    So but for one shift, of all by 4, no bit is shifted by itself.
    """
    if half:
        word = lax.shift_right_logical(word, jnp.uint32(PHASES))
    return (word & jnp.uint32(0x01010101 << phase)).astype(jnp.int32)


def _multiply(before: Any, left: list[Any], right: list[Any], phases: range, words: int) -> Any:
    """Adds products of two slices' words with two heads' query, in some of the phases.

    Each lane of a warp keeps tokens of its own, though the matrix units take whole rows from four
    of them: lanes 4 g to 4 g + 3 make up row g of the left operand, each with the bytes of its own
    word, and column 2 c + j of the right operand holds head j's query where the bytes are those of
    lane 4 g + c, and zeros elsewhere. So what a lane gets of the product, columns 2 c and 2 c + 1
    of its row, are both heads' sums over its own word.

    Args:
        before: what this gave in the phases before, or None.
        left: `[phase][word][half][slice]`, from `_bits`: `[threads]` int32 each.
        right: `[phase][word][half]`, from `_query.pack`: `[threads]` int32 each.
        phases: which ones.
        words: of a code.

    Returns:
        `[threads]` int64: four sums of 16 bits, of the first slice for both heads, then of the
        second one, for the assembly has one result.
    """
    lines = [".reg .b32 s<4>, low, high;"]
    sums = "{s0, s1, s2, s3}"
    operands = [*left, *right]
    if before is None:
        lines += [f"mov.b32 s{i}, 0;" for i in range(4)]
    else:
        lines += [f"mov.b64 {{low, high}}, ${1 + len(operands)};"]
        lines += [
            f"prmt.b32 s{i}, {('low', 'high')[i // 2]}, 0, {SIGNED_HALVES[i % 2]};"
            for i in range(4)
        ]
        operands.append(before)
    for phase in phases:
        # A phase's bits weigh twice as much as those of the one before.
        lines += [f"add.s32 s{i}, s{i}, s{i};" for i in range(4) if phase]
        for w in range(words):
            n = (phase - phases[0]) * words + w
            a = ", ".join(f"${1 + 4 * n + i}" for i in range(4))
            b = ", ".join(f"${1 + len(left) + 2 * n + i}" for i in range(2))
            lines.append(
                f"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sums}, {{{a}}}, {{{b}}}, {sums};"
            )
    if phases[-1] == PHASES - 1:
        lines += [f"shr.s32 s{i}, s{i}, {PHASES - 1};" for i in range(4)]
    lines += [
        "prmt.b32 low, s0, s1, 0x5410;",
        "prmt.b32 high, s2, s3, 0x5410;",
        "mov.b64 $0, {low, high};",
    ]
    return _pallas.assembly("{\n" + "\n".join(lines) + "\n}", *operands, dtype=jnp.int64)


# Selects the lower or the upper half of a word, with its sign.
SIGNED_HALVES = "0x9910", "0xbb32"


def _after(lane: Any, sums: Any) -> Any:
    """The lanes as they are, but not before the sums: what they load takes no registers before."""
    # The last sum has 15 bits and a sign, so that zero is added.
    text = (
        "{ .reg .b32 low, high; mov.b64 {low, high}, $2; prmt.b32 high, high, 0, 0xbb32; "
        "add.s32 high, high, 32768; shr.s32 high, high, 16; add.s32 $0, $1, high; }"
    )
    return _pallas.assembly(text, lane, sums, dtype=jnp.int32)


def _part(sums: Any, nth: int) -> Any:
    """One of the four sums that `_multiply` gives: `[threads]` int32."""
    word, selector = ("low", "high")[nth // 2], SIGNED_HALVES[nth % 2]
    text = (
        f"{{ .reg .b32 low, high; mov.b64 {{low, high}}, $1; prmt.b32 $0, {word}, 0, {selector}; }}"
    )
    return _pallas.assembly(text, sums, dtype=jnp.int32)


def emulated(words: list[list[Any]], load: Load, pairs: int) -> list[list[Any]]:
    """What `products` gives, in plain JAX."""

    def of_head(of_slice: list[Any], pair: int, head: int) -> Any:
        total = jnp.zeros(of_slice[0].shape, jnp.int32)
        for w, word in enumerate(of_slice):
            for k in range(BYTE):
                # One of the lanes that hold the head's query.
                packed = load(jnp.int32(4 * head), pair, k % PHASES, w, k // PHASES)
                for i in range(4):
                    bit = lax.shift_right_logical(word, jnp.uint32(k + BYTE * i)) & 1
                    byte = lax.shift_right_arithmetic(packed << (24 - 8 * i), jnp.int32(24))
                    total = total + bit.astype(jnp.int32) * byte
        return total

    return [[of_head(x, g // 2, g % 2) for g in range(2 * pairs)] for x in words]


def log_sum_exp2(heads: list[Any], *, emulate: bool) -> Any:
    """The natural logarithm of the heads' summed powers of 2: `[n]` float32.

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
    """x * y + z in float32, for `[n]` and numbers, by one instruction: Triton makes two of it."""
    if emulate:
        return x * y + z
    y, z = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), x.shape) for a in (y, z))
    return _pallas.assembly("fma.rn.f32 $0, $1, $2, $3;", x, y, z, dtype=x.dtype)


def _approximate(instruction: str, x: Any) -> Any:
    return _pallas.assembly(f"{instruction}.approx.ftz.f32 $0, $1;", x, dtype=x.dtype)
