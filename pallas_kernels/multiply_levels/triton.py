"""`multiply_levels` as a Triton kernel: levels are taken apart in registers, and multiplied.

A program has some rows of the matrix, and a part of their columns. The matrix is the left operand
of its products: one that a warp makes where it read the levels to. Any order of columns gives the
same sum. So the lower levels of bytes and the upper ones are two products, each with the tokens'
numbers of its own columns.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.levels import MIDDLE, Levels
from pallas_kernels.multiply_levels import _registers
from pallas_kernels.toolbox import launch

# Tokens that the kernel multiplies.
MOST_TOKENS = 32

# The least tokens of a tile: the columns of a matrix unit's product.
_TOKEN_TILE = 8

# The least bytes of a group: a register's.
_LEAST_RUN = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        rows: of the matrix that a program multiplies.
        block: bytes of a row's levels that it reads at once.
        splits: parts that the columns are cut into, each a program's; summed afterwards.
        pairs: compute levels of 4 bits two at a time in the tokens' dtype, bfloat16 or float16, to
            which scales and minima are rounded then. Else each is computed in float32.
        num_warps, num_stages: see Triton.
    """

    rows: int = 64
    block: int = 128
    splits: int = 1
    pairs: bool = False
    num_warps: int = 2
    num_stages: int = 4


def heuristic(matrix: Levels, tokens: int, dtype: Any) -> Config:
    """Choose a config for shapes that were not tuned.

    Args:
        matrix: of which only shapes and dtypes count.
        tokens: that are multiplied.
        dtype: of the tokens.
    """
    out, row_bytes = matrix.levels.shape
    if dtype == jnp.float32:
        # Its products are made one by one, in registers.
        return Config(32, 32, splits_of(out, row_bytes, 32, 32), num_warps=4, num_stages=2)
    rows = min(64, launch.tile(out, launch.DOT_TILE))
    block = 128 if tokens <= 16 else 64
    # Where nothing is rounded that is not otherwise.
    exact = matrix.scale_factors is None and matrix.scales.dtype == dtype
    return Config(rows, block, splits_of(out, row_bytes, rows, block), pairs=exact)


def splits_of(out: int, row_bytes: int, rows: int, block: int) -> int:
    """Cut columns until each of an H200's processors has three programs, if they read 4 blocks."""
    tiles, blocks = pl.cdiv(out, rows), pl.cdiv(row_bytes, block)
    return max(1, min(-(-3 * 132 // tiles), blocks // 4))


def _kernel(inputs: Any, matrix: Levels, sums: Any, *, config: Config, interpret: bool) -> None:
    """One part of the columns, for some of the rows: `[tokens, rows]` of the product."""
    tokens, columns = inputs.shape
    out, row_bytes = matrix.levels.shape
    run = matrix.group * matrix.bits // 8
    tile, part = pl.program_id(0), pl.program_id(1)
    row = tile * config.rows + jnp.arange(config.rows)
    # Those past the end read the last row.
    at = (row if out % config.rows == 0 else jnp.minimum(row, out - 1))[:, None]
    token = jnp.arange(launch.tile(tokens, _TOKEN_TILE))
    blocks = pl.cdiv(row_bytes, config.block)
    steps = pl.cdiv(blocks, config.splits)

    def visit(i: Any, total: Any) -> Any:
        block = part * steps + i
        byte = block * config.block + jnp.arange(config.block)
        exists = None if row_bytes % config.block == 0 else byte < row_bytes
        levels = _load(matrix.levels, at, byte, exists)
        halves = _numbers(matrix, levels, at, block, inputs.dtype, config, interpret)
        for half, numbers in enumerate(halves):
            column = _columns(block, config.block, run, half if len(halves) > 1 else None)
            given = plt.load(
                inputs.at[token[:, None], column[None, :]],
                mask=(token < tokens)[:, None] & (column < columns)[None, :],
                other=0,
            )
            total = total + launch.dot(numbers, given, (1, 1))
        return total

    zero = jnp.zeros((config.rows, token.shape[0]), jnp.float32)
    end = steps if blocks % config.splits == 0 else jnp.clip(blocks - part * steps, 0, steps)
    total = lax.fori_loop(0, end, visit, zero)
    plt.store(
        sums.at[part, token[None, :], row[:, None]],
        total.astype(sums.dtype),
        mask=(token < tokens)[None, :] & (row < out)[:, None],
    )


def _numbers(
    matrix: Levels, levels: Any, at: Any, block: Any, dtype: Any, config: Config, interpret: bool
) -> list[Any]:
    """Dequantise a block of bytes, `[rows, bytes]`: one number of each byte, or two.

    Args:
        matrix: refs.
        levels: the block's bytes.
        at: the numbers of rows, `[rows, 1]`.
        block: its number.
        dtype: of the numbers.
        config: of the kernel.
        interpret: whether the kernel is interpreted.
    """
    run = matrix.group * matrix.bits // 8
    spread = functools.partial(_spread, run=run, size=config.block)
    read = functools.partial(_scales, at=at, block=block, run=run, size=config.block)
    scale = read(matrix.scales, matrix.scale_factors)
    least = None if matrix.minima is None else read(matrix.minima, matrix.minimum_factors)
    by_assembly = matrix.bits == 4 and launch.takes_assembly(interpret)
    if by_assembly and config.pairs and dtype != jnp.float32:
        rounded = [None if x is None else spread(x.astype(dtype)) for x in (scale, least)]
        return _registers.in_pairs(levels, *rounded)
    bias = _registers.BIAS if by_assembly else 0
    if matrix.bits == 4 and least is None:
        bias += MIDDLE
    found = _registers.biased(levels) if by_assembly else _registers.plain(levels)
    found = [numbers * spread(scale) for numbers in found]
    if bias:
        least = -bias * scale + (0 if least is None else least)
    if least is not None:
        found = [numbers + spread(least) for numbers in found]
    return [numbers.astype(dtype) for numbers in found]


def _scales(small: Any, factors: Any, *, at: Any, block: Any, run: int, size: int) -> Any:
    """Load the scales, or minima, of a block's groups: float32 `[rows, groups]`.

    Args:
        small: the scales' ref.
        factors: that of their factors, or None.
        at: the numbers of rows, `[rows, 1]`.
        block: its number.
        run: bytes of a group.
        size: bytes of a block.
    """
    groups, count = small.shape[1], max(1, size // run)
    first = lax.div(block, jnp.int32(run // size)) if run > size else block * count
    group = first + jnp.arange(count)
    exists = None if groups % count == 0 else group < groups
    wide = _load(small, at, group, exists).astype(jnp.float32)
    if factors is None:
        return wide
    shared = groups // factors.shape[1]
    if shared % count == 0:
        # One factor for all of them.
        group, exists = first + jnp.arange(1), None
    factor = _load(factors, at, lax.div(group, jnp.int32(shared)), exists)
    return wide * factor.astype(jnp.float32)


def _spread(x: Any, *, run: int, size: int) -> Any:
    """Give each byte its group's number: `[rows, groups]` to `[rows, bytes]`."""
    rows, groups = x.shape
    if groups == 1:
        return jnp.broadcast_to(x, (rows, size))
    return jnp.broadcast_to(x[:, :, None], (rows, groups, run)).reshape(rows, size)


def _columns(block: Any, size: int, run: int, half: int | None) -> Any:
    """Find the columns of a block's bytes: `[bytes]` int32.

    Args:
        block: its number.
        size: bytes of a block.
        run: bytes of a group.
        half: which of a byte's two levels; None if it has one.
    """
    # Not by // and %: of lax's remainders, Triton sees which numbers follow each other.
    byte = jnp.arange(size)
    if half is None:
        return block * size + byte
    if run > size:
        group = lax.div(block, jnp.int32(run // size))
        return block * size + (group + half) * run + byte
    group, rest = lax.div(byte, jnp.int32(run)), lax.rem(byte, jnp.int32(run))
    return (block * (2 * size) + half * run) + (group * (2 * run) + rest)


def _load(array: Any, row: Any, column: Any, exists: Any) -> Any:
    """Load `[rows, columns]` of an array; zeros where none `exists`, which is None for all."""
    if exists is None:
        return plt.load(array.at[row, column[None, :]])
    return plt.load(array.at[row, column[None, :]], mask=exists[None, :], other=0)


def multiply_levels(
    inputs: Array,
    matrix: Levels,
    *,
    dtype: DTypeLike | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """See `pallas_kernels.multiply_levels`.

    Raises:
        NotImplementedError: for groups, a number of tokens or a dtype that the kernel is not made
            for.
    """
    *batch, columns = inputs.shape
    tokens = math.prod(batch)
    out = matrix.levels.shape[0]
    _check(matrix, tokens, inputs.dtype)
    if config is None:
        config = tuning.config(
            "multiply_levels",
            heuristic(matrix, tokens, inputs.dtype),
            out=out,
            columns=columns,
            tokens=launch.tile(tokens, _TOKEN_TILE),
            dtype=inputs.dtype.name,
            format=f"{matrix.bits}-{matrix.group}-{matrix.scales.dtype.name}"
            + ("-minima" if matrix.minima is not None else ""),
        )
    wanted = jnp.dtype(dtype or inputs.dtype)
    sums = launch.call(
        functools.partial(_kernel, config=config, interpret=interpret),
        (inputs.reshape(tokens, columns), matrix),
        jax.ShapeDtypeStruct(
            (config.splits, tokens, out), wanted if config.splits == 1 else jnp.float32
        ),
        (pl.cdiv(out, config.rows), config.splits),
        name="multiply_levels",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    product = sums[0] if config.splits == 1 else jnp.sum(sums, axis=0).astype(wanted)
    return product.reshape(*batch, out)


def _check(matrix: Levels, tokens: int, dtype: Any) -> None:
    """Raise NotImplementedError for what the kernel is not made for."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise NotImplementedError(
            f"multiply_levels: there are {tokens} tokens; the kernel knows 1 to {MOST_TOKENS}"
        )
    if dtype not in launch.FLOATS:
        raise NotImplementedError(
            f"multiply_levels: dtype is {jnp.dtype(dtype).name}; the kernel knows bfloat16, "
            "float16 and float32"
        )
    run = matrix.group * matrix.bits // 8
    if run < _LEAST_RUN or run != launch.tile(run):
        raise NotImplementedError(
            f"multiply_levels: {matrix.group} levels of {matrix.bits} bits are a group; the kernel "
            f"knows groups of 2^n bytes, at least {_LEAST_RUN}"
        )
