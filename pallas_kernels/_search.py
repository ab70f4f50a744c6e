"""Where a selection ends, by counting keys in bins: a program's threads together, in few passes.

A bisection on ordered bits takes a round for each bit of the answer, and each round waits for a sum
over all threads. Bins settle `BITS` of them at once: each thread adds its elements to bins in the
processor's shared memory, and one warp finds the bin in which the selection ends.
Neither is in Pallas' Triton backend (jax 0.11), so it is a piece of CUDA's assembly.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _pallas, _warp
from pallas_kernels._bisect import threshold

# What a pass settles: 512 bins, 16 of them a lane's.
BITS = 9
BINS = 2**BITS
BINS_A_LANE = BINS // _warp.LANES


class Last(NamedTuple):
    """Where a selection ends; of each number `[threads]`, the same in all threads.

    Attributes:
        key: uint32, the largest key whose holders, with all of a larger key, weigh the budget or
            more; the least key of all where everything together weighs less.
        above: int32, what the larger keys weigh.
        ties: int32, how many elements have the key.
    """

    key: Any
    above: Any
    ties: Any


def last_key(
    keys: Sequence[Any],
    weights: Sequence[Any] | None,
    budget: Any,
    *,
    fine: int = 0,
    interpret: bool,
) -> Last:
    """Where the selection of the largest keys ends that together weigh the budget or more.

    Every thread of the program must call it, with one element of each vector.

    Args:
        keys: `[threads]` uint32 each; zero for what does not exist.
        weights: `[threads]` int32 each, none negative; None for one each.
        budget: int32, at least 1; a number or `[threads]` of it.
        fine: the key may lie below what it should be by less than 2^fine; above and ties have no
            meaning if it is not zero.
        interpret: whether the kernel is interpreted.
    """
    threads = keys[0].shape[0]
    budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (threads,))
    if interpret or not _pallas.on_cuda():
        return _by_bisection(keys, weights, budget)
    operands = [*keys, budget, *(weights or ())]
    text = _assembly(len(keys), weights is not None, threads, fine)
    found = _pallas.assembly(text, *operands, dtype=jnp.int32)
    # Pallas' assembly has one result, so each quarter of a warp has another number.
    key, above, ties = (
        _warp.from_lane(found, jnp.full(threads, _warp.LANES // 4 * i, jnp.int32)) for i in range(3)
    )
    return Last(lax.bitcast_convert_type(key, jnp.uint32), above, ties)


def _by_bisection(keys: Sequence[Any], weights: Sequence[Any] | None, budget: Any) -> Last:
    """The same in plain JAX, to any fineness."""
    most, budget = jnp.uint32(2**32 - 1), jnp.max(budget)
    weights = weights or [jnp.ones(key.shape, jnp.int32) for key in keys]

    def together(combine: Any, values: Any) -> Any:
        return functools.reduce(combine, values)

    def held(bound: Any) -> Any:
        of_key = (
            jnp.where((key >= bound) & (key > 0), weight, 0)
            for key, weight in zip(keys, weights, strict=True)
        )
        return jnp.sum(together(jnp.add, of_key))

    def least_from(bound: Any) -> Any:
        of_key = (jnp.where((key >= bound) & (key > 0), key, most) for key in keys)
        return jnp.min(together(jnp.minimum, of_key))

    high = jnp.max(together(jnp.maximum, keys))
    low = jnp.minimum(least_from(jnp.uint32(0)), high)
    key, _ = threshold(held, budget, low, high + jnp.uint32(1))
    # Where the budget is held exactly, the search ends before the key is one that is there.
    key = jnp.minimum(least_from(key), high)
    ties = jnp.sum(together(jnp.add, ((x == key).astype(jnp.int32) for x in keys)))
    shape = keys[0].shape
    return Last(*(jnp.broadcast_to(x, shape) for x in (key, held(key + jnp.uint32(1)), ties)))


def _assembly(number: int, weighted: bool, threads: int, fine: int) -> str:
    """PTX: $0 the result, then so many keys, the budget, and the keys' weights if they have any.

    Two histograms take turns: while one is filled the next one is cleared. The first warp alone
    finds the bin: all of them together would wait for each other.
    """
    warps = threads // _warp.LANES
    keys = [f"${1 + i}" for i in range(number)]
    weights = [f"${2 + number + i}" if weighted else "1" for i in range(number)]
    counts_ties = fine == 0
    lines = [
        ".reg .pred inside, full, last;",
        ".reg .b32 least, most, range, shift, want, above, ties, bin, at, own, sum, x, y;",
        ".reg .b32 lane, warp, thread, clear, base, ends, found;",
        f".reg .b32 n<{BINS_A_LANE}>;",
        f".shared .align 16 .b32 bins[{2 * BINS}];",
        f".shared .align 16 .b32 both[{2 * _warp.LANES}];",
        ".shared .align 16 .b32 result[4];",
        "mov.u32 thread, %tid.x;",
        "and.b32 lane, thread, 31;",
        "shr.u32 warp, thread, 5;",
        "mov.u32 base, bins;",
        "mov.u32 ends, both;",
        "mov.u32 found, result;",
        f"mov.b32 want, ${1 + number};",
        "mov.b32 above, 0;",
        # The least and the largest key. One less, so that zero, which is none's, is the largest.
        "mov.b32 least, -1;",
        "mov.b32 most, 0;",
    ]
    for key in keys:
        lines += [
            f"add.u32 x, {key}, -1;",
            "min.u32 least, least, x;",
            f"max.u32 most, most, {key};",
        ]
    lines += [
        "redux.sync.min.u32 least, least, 0xffffffff;",
        "redux.sync.max.u32 most, most, 0xffffffff;",
        "mad.lo.u32 clear, thread, 4, base;",
        # Whoever still reads from an earlier call must be done.
        "bar.sync 0;",
        "mad.lo.u32 x, warp, 8, ends;",
        "st.shared.v2.b32 [x], {least, most};",
        *_clear("clear", threads),
        "bar.sync 0;",
        f"and.b32 x, lane, {warps - 1};",
        "mad.lo.u32 x, x, 8, ends;",
        "ld.shared.v2.b32 {least, most}, [x];",
        "redux.sync.min.u32 least, least, 0xffffffff;",
        "redux.sync.max.u32 most, most, 0xffffffff;",
        "add.u32 least, least, 1;",
        "sub.u32 range, most, least;",
        # How far an offset is shifted to be a bin's number.
        "clz.b32 shift, range;",
        f"sub.s32 shift, {32 - BITS}, shift;",
        "max.s32 shift, shift, 0;",
        "mov.b32 at, 0;",
        "pass:",
        "add.u32 own, base, at;",
        f"xor.b32 at, at, {4 * BINS};",
    ]
    for key, weight in zip(keys, weights, strict=True):
        lines += [
            f"sub.u32 x, {key}, least;",
            "setp.le.u32 inside, x, range;",
            "shr.u32 x, x, shift;",
            "mad.lo.u32 x, x, 4, own;",
            f"@inside red.shared.add.u32 [x], {weight};",
        ]
    lines += [
        "add.u32 x, clear, at;",
        *_clear("x", threads),
        "bar.sync 0;",
        "setp.ne.u32 inside, warp, 0;",
        "@inside bra know;",
        f"mad.lo.u32 x, lane, {4 * BINS_A_LANE}, own;",
    ]
    for i in range(0, BINS_A_LANE, 4):
        four = ", ".join(f"n{i + j}" for j in range(4))
        lines.append(f"ld.shared.v4.b32 {{{four}}}, [x+{4 * i}];")
    # What a lane's bins hold, with those of all higher lanes.
    lines.append("mov.b32 own, n0;")
    lines += [f"add.u32 own, own, n{i};" for i in range(1, BINS_A_LANE)]
    lines.append("mov.b32 sum, own;")
    for distance in (1, 2, 4, 8, 16):
        lines += [
            f"shfl.sync.down.b32 x|inside, sum, {distance}, 31, 0xffffffff;",
            "@inside add.u32 sum, sum, x;",
        ]
    lines += [
        # The highest lane whose sum is enough has the bin; the lowest one if none is.
        "setp.ge.u32 full, sum, want;",
        "vote.sync.ballot.b32 x, full, 0xffffffff;",
        "or.b32 x, x, 1;",
        "bfind.u32 x, x;",
        "sub.u32 sum, sum, own;",
        "mov.b32 bin, 0;",
        "mov.b32 own, sum;",
        "mov.b32 ties, 0;",
    ]
    # Down the lane's bins, for as long as those above do not hold enough.
    for i in reversed(range(BINS_A_LANE)):
        lines += [
            "setp.lt.u32 full, sum, want;",
            f"@full mov.b32 bin, {i};",
            "@full mov.b32 own, sum;",
            f"@full mov.b32 ties, n{i};",
            f"add.u32 sum, sum, n{i};",
        ]
    lines += [
        f"mad.lo.u32 bin, lane, {BINS_A_LANE}, bin;",
        "setp.eq.u32 full, x, lane;",
        "mov.b32 y, 0;",
        "@full st.shared.v4.b32 [found], {bin, own, ties, y};",
        "know:",
        "bar.sync 0;",
        "ld.shared.v4.b32 {bin, own, ties, y}, [found];",
        "add.u32 above, above, own;",
        "sub.u32 want, want, own;",
        "shl.b32 bin, bin, shift;",
        "add.u32 least, least, bin;",
        f"setp.le.s32 last, shift, {fine};",
        "@last bra done;",
        "sub.u32 range, range, bin;",
        "mov.b32 y, 1;",
        "shl.b32 y, y, shift;",
        "sub.u32 y, y, 1;",
        "min.u32 range, range, y;",
        f"sub.s32 shift, shift, {BITS};",
        "max.s32 shift, shift, 0;",
        "bra.uni pass;",
        "done:",
    ]
    if counts_ties and weighted:
        # A bin holds weights; how many elements have the key is counted.
        lines.append("mov.b32 sum, 0;")
        for key in keys:
            lines += [f"setp.eq.u32 full, {key}, least;", "@full add.u32 sum, sum, 1;"]
        lines += [
            "redux.sync.add.s32 sum, sum, 0xffffffff;",
            "mad.lo.u32 x, warp, 4, ends;",
            "st.shared.b32 [x], sum;",
            "bar.sync 0;",
            f"and.b32 x, lane, {warps - 1};",
            "mad.lo.u32 x, x, 4, ends;",
            "ld.shared.b32 ties, [x];",
            f"setp.lt.u32 full, lane, {warps};",
            "selp.b32 ties, ties, 0, full;",
            "redux.sync.add.s32 ties, ties, 0xffffffff;",
        ]
    lines += [
        "setp.lt.u32 full, lane, 16;",
        "selp.b32 x, above, ties, full;",
        "setp.lt.u32 full, lane, 8;",
        "selp.b32 $0, least, x, full;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def _clear(first: str, threads: int) -> list[str]:
    """PTX that sets a histogram to zero; `first` is the address of the thread's first bin."""
    if threads <= BINS:
        return [f"st.shared.b32 [{first}+{4 * i}], 0;" for i in range(0, BINS, threads)]
    return [
        f"setp.lt.u32 inside, thread, {BINS};",
        f"@inside st.shared.b32 [{first}], 0;",
    ]
