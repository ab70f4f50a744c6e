"""How the levels of a block of bytes become numbers in registers: plainly, or by CUDA's assembly.

A byte of two levels is eight bits of a register that holds four. A float whose upper bits are fixed
and whose lower ones are a level is a power of two plus the level: no level is converted.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.levels import MIDDLE
from pallas_kernels.toolbox import launch

# A float32 of the bytes 0x43, level, 0, 0 is this more than the level.
BIAS = 128

# Of two 16-bit floats in a register: their name in PTX, the upper byte of a float that is a power
# of two plus a level, minus that power, and one.
_PAIRS = {
    "bfloat16": ("bf16x2", 0x43, 0xC300, 0x3F80),
    "float16": ("f16x2", 0x64, 0xE400, 0x3C00),
}

# How to get the lower levels of a register's bytes, and the upper ones.
_HALVES = (
    "and.b32 low, {levels}, 0x0f0f0f0f;",
    "shr.u32 low, {levels}, 4;\nand.b32 low, low, 0x0f0f0f0f;",
)


def plain(levels: Any) -> list[Any]:
    """Return the levels of `[rows, bytes]` in float32, as they are kept: one or two of a byte."""
    if levels.dtype == jnp.int8:
        return [levels.astype(jnp.float32)]
    wide = levels.astype(jnp.int32)
    return [(wide & 15).astype(jnp.float32), (wide >> 4).astype(jnp.float32)]


def biased(levels: Any) -> list[Any]:
    """Return both levels of each byte, `[rows, bytes]` uint8, in float32: `BIAS` more than they."""
    picks = "\n".join(f"prmt.b32 ${i}, low, 0x43, 0x4{i}55;" for i in range(4))
    return [
        launch.assembly(
            "\n".join(["{", ".reg .b32 low;", half.format(levels="$4"), picks, "}"]),
            levels,
            dtype=jnp.float32,
            pack=4,
        )
        for half in _HALVES
    ]


def in_pairs(levels: Any, scale: Any, minimum: Any) -> list[Any]:
    """Return the numbers of both levels of each byte, computed two at a time in their own dtype.

    Args:
        levels: `[rows, bytes]` uint8.
        scale: of the same shape, bfloat16 or float16.
        minimum: as `scale`; or None, where levels are kept as `MIDDLE` more.
    """
    kind, upper, power, one = _PAIRS[scale.dtype.name]
    operands, added = [levels, scale], ("zero", "zero")
    if minimum is None:
        # Next to the power of two, a level is worth a unit in the last place.
        power += MIDDLE
    else:
        operands, added = [*operands, minimum], ("$5", "$6")

    def both(bits: int) -> str:
        return f"{bits << 16 | bits:#x}"

    text = [
        f"prmt.b32 first, low, {both(upper << 8 | upper)}, 0x4140;",
        f"prmt.b32 second, low, {both(upper << 8 | upper)}, 0x4342;",
        f"mov.b32 one, {both(one)};",
        f"mov.b32 power, {both(power)};",
        f"mov.b32 zero, {both(0x8000)};",  # -0.0: it takes no sign
        f"fma.rn.{kind} first, first, one, power;",
        f"fma.rn.{kind} second, second, one, power;",
        f"fma.rn.{kind} $0, first, $3, {added[0]};",
        f"fma.rn.{kind} $1, second, $4, {added[1]};",
        "}",
    ]
    begin = ["{", ".reg .b32 low, first, second, one, power, zero;"]
    return [
        launch.assembly(
            "\n".join([*begin, half.format(levels="$2"), *text]),
            *operands,
            dtype=scale.dtype,
            pack=4,
        )
        for half in _HALVES
    ]
