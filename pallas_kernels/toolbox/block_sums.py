"""Sums over a program's threads, of several numbers at once: one barrier serves all.

Triton makes sums one by one, each with barriers of its own, and leaves the result in a form of its
own. Here each thread has one element of a vector, before and after.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels.toolbox import launch, warp


def sum_together(values: Sequence[Any], *, interpret: bool) -> list[Any]:
    """Sum over the program's threads of several numbers, with one barrier for all.

    Args:
        values: `[threads]` int32 each, at most 32.
        interpret: whether the kernel is interpreted.

    Returns:
        `[threads]` int32 each, the same in all threads.
    """
    threads, number = values[0].shape[0], len(values)
    if not launch.takes_assembly(interpret):
        return [jnp.broadcast_to(jnp.sum(x), (threads,)) for x in values]
    warps = threads // warp.LANES
    lines = [
        ".reg .pred p;",
        f".reg .b32 lane, thread, x, y, base, v<{number}>;",
        f".shared .align 4 .b32 sums[{warp.LANES * number}];",
        "mov.u32 thread, %tid.x;",
        "and.b32 lane, thread, 31;",
        "shr.u32 x, thread, 5;",
        "mov.u32 base, sums;",
        "mad.lo.u32 x, x, 4, base;",
        f"and.b32 y, lane, {warps - 1};",
        "mad.lo.u32 y, y, 4, base;",
        "bar.sync 0;",
    ]
    for i in range(number):
        lines += [
            f"redux.sync.add.s32 v{i}, ${1 + i}, 0xffffffff;",
            f"st.shared.b32 [x+{4 * warp.LANES * i}], v{i};",
        ]
    lines += ["bar.sync 0;", f"setp.lt.u32 p, lane, {warps};"]
    for i in range(number):
        lines += [
            f"ld.shared.b32 v{i}, [y+{4 * warp.LANES * i}];",
            f"selp.b32 v{i}, v{i}, 0, p;",
            f"redux.sync.add.s32 v{i}, v{i}, 0xffffffff;",
        ]
    lines.append("mov.b32 x, v0;")
    for i in range(1, number):
        lines += [f"setp.eq.u32 p, lane, {i};", f"selp.b32 x, v{i}, x, p;"]
    lines.append("mov.b32 $0, x;")
    text = "{\n" + "\n".join(lines) + "\n}"
    found = launch.assembly(text, *values, dtype=jnp.int32)
    # Pallas' assembly has one result, so each lane has another sum.
    return [warp.from_lane(found, jnp.full(threads, i, jnp.int32)) for i in range(number)]


def scan_together(values: Sequence[Any], *, interpret: bool) -> list[tuple[Any, Any]]:
    """Sum of several numbers over the threads before each, with one barrier for all.

    Args:
        values: `[threads]` int32 each.
        interpret: whether the kernel is interpreted.

    Returns:
        for each, `[threads]` int32: what the threads before have, and what all threads have.
    """
    threads, number = values[0].shape[0], len(values)
    if not launch.takes_assembly(interpret):
        through = [jnp.cumsum(x) for x in values]
        return [
            (y - x, jnp.zeros_like(x) + jnp.sum(x)) for x, y in zip(values, through, strict=True)
        ]
    warps, most = threads // warp.LANES, warp.LANES // 2
    if number > most:
        parts = values[:most], values[most:]
        return [x for part in parts for x in scan_together(part, interpret=interpret)]
    steps = (
        f"shfl.sync.up.b32 t|p, s, {distance}, 0, 0xffffffff; @p add.u32 s, s, t;"
        for distance in (1, 2, 4, 8, 16)
    )
    scan = "{ .reg .pred p; .reg .b32 s, t; mov.b32 s, $1; " + " ".join(steps) + " mov.b32 $0, s; }"
    through = [launch.assembly(scan, x, dtype=jnp.int32) for x in values]
    lines = [
        ".reg .pred last, exists, before, p;",
        ".reg .b32 lane, warp, thread, x, y, t, base, result;",
        f".shared .align 4 .b32 sums[{warp.LANES * number}];",
        "mov.u32 thread, %tid.x;",
        "and.b32 lane, thread, 31;",
        "shr.u32 warp, thread, 5;",
        "mov.u32 base, sums;",
        "mad.lo.u32 x, warp, 4, base;",
        "mad.lo.u32 y, lane, 4, base;",
        "setp.eq.u32 last, lane, 31;",
        f"setp.lt.u32 exists, lane, {warps};",
        "setp.lt.u32 before, lane, warp;",
        "mov.b32 result, 0;",
        "bar.sync 0;",
    ]
    lines += [f"@last st.shared.b32 [x+{4 * warp.LANES * i}], ${1 + i};" for i in range(number)]
    lines.append("bar.sync 0;")
    for i in range(number):
        lines += [
            "mov.b32 t, 0;",
            f"@exists ld.shared.b32 t, [y+{4 * warp.LANES * i}];",
            "redux.sync.add.s32 x, t, 0xffffffff;",
            "selp.b32 t, t, 0, before;",
            "redux.sync.add.s32 t, t, 0xffffffff;",
            f"setp.eq.u32 p, lane, {i};",
            "selp.b32 result, t, result, p;",
            f"setp.eq.u32 p, lane, {most + i};",
            "selp.b32 result, x, result, p;",
        ]
    lines.append("mov.b32 $0, result;")
    text = "{\n" + "\n".join(lines) + "\n}"
    found = launch.assembly(text, *through, dtype=jnp.int32)

    def from_lane(lane: int) -> Any:
        # Pallas' assembly has one result, so each lane has another number.
        return warp.from_lane(found, jnp.full(threads, lane, jnp.int32))

    return [
        (from_lane(i) + x - value, from_lane(most + i))
        for i, (value, x) in enumerate(zip(values, through, strict=True))
    ]
