"""The assembly of `_search`: keys are counted by bins in the processor's shared memory."""

from pallas_kernels.toolbox.warp import LANES

# What a pass settles: 512 bins, 16 of them a lane's.
BITS = 9
BINS = 2**BITS
BINS_A_LANE = BINS // LANES


def search(number: int, weighted: bool, threads: int, fine: int) -> str:
    """PTX: $0 the result, then so many keys, the budget, and the keys' weights if they have any.

    Two histograms take turns: while one is filled the next one is cleared. The first warp alone
    finds the bin: all of them together would wait for each other.
    """
    warps = threads // LANES
    keys = [f"${1 + i}" for i in range(number)]
    weights = [f"${2 + number + i}" if weighted else "1" for i in range(number)]
    counts_ties = fine == 0
    lines = [
        ".reg .pred inside, full, last;",
        ".reg .b32 least, most, range, shift, want, above, ties, bin, at, own, sum, x, y;",
        ".reg .b32 lane, warp, thread, clear, base, ends, found, outside;",
        f".reg .b32 n<{BINS_A_LANE}>;",
        # Behind the bins, a place for each lane where what is in none of them may go.
        f".shared .align 16 .b32 bins[{2 * BINS + LANES}];",
        f".shared .align 16 .b32 both[{2 * LANES}];",
        ".shared .align 16 .b32 result[4];",
        ".shared .align 4 .b32 single;",
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
        f"add.u32 outside, lane, {2 * BINS};",
        "mad.lo.u32 outside, outside, 4, base;",
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
            "selp.b32 x, x, outside, inside;",
            f"red.shared.add.u32 [x], {weight};",
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
        *([] if weighted or fine else _read_single(keys)),
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


def _read_single(keys: list[str]) -> list[str]:
    """PTX that ends the search where a single element is left in the bin: that one has the key."""
    lines = ["setp.ne.u32 last, ties, 1;", "@last bra more;"]
    for key in keys:
        lines += [
            f"sub.u32 x, {key}, least;",
            "setp.le.u32 full, x, range;",
            f"@full st.shared.b32 [single], {key};",
        ]
    lines += ["bar.sync 0;", "ld.shared.b32 least, [single];", "bra.uni done;", "more:"]
    return lines


def _clear(first: str, threads: int) -> list[str]:
    """PTX that sets a histogram to zero; `first` is the address of the thread's first bin."""
    if threads <= BINS:
        return [f"st.shared.b32 [{first}+{4 * i}], 0;" for i in range(0, BINS, threads)]
    return [
        f"setp.lt.u32 inside, thread, {BINS};",
        f"@inside st.shared.b32 [{first}], 0;",
    ]
