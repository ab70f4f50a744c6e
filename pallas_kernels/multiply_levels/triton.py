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
from pallas_kernels.levels import Levels
from pallas_kernels.multiply_levels._block import Block, bytes_of_group
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
    # Whether pairs round nothing that is not rounded otherwise. In bfloat16 they are worth what
    # they round, in float16 small scales would lose more.
    exact = matrix.scale_factors is None and matrix.scales.dtype == dtype
    pairs = matrix.bits == 4 and (exact or dtype == jnp.bfloat16)
    # Of more than 8 tokens a wide block takes more shared memory than AMD's GPUs have.
    wide = pairs and not exact and tokens <= _TOKEN_TILE
    block = 64 if tokens > 16 else 256 if wide else 128
    stages = 3 if pairs and tokens <= 16 else 4
    splits = splits_of(out, row_bytes, rows, block)
    return Config(rows, block, splits, pairs=pairs, num_stages=stages)


def splits_of(out: int, row_bytes: int, rows: int, block: int) -> int:
    """Cut columns until each of an H200's processors has three programs, if they read 2 blocks.

    Into parts of one size if that takes at most half of the programs away.
    """
    tiles, blocks = pl.cdiv(out, rows), pl.cdiv(row_bytes, block)
    most = max(1, min(-(-3 * 132 // tiles), blocks // 2))
    even = max(n for n in range(1, most + 1) if blocks % n == 0)
    return even if 2 * even >= most else most


def _kernel(inputs: Any, matrix: Levels, sums: Any, *, config: Config, interpret: bool) -> None:
    """One part of the columns, for some of the rows: `[tokens, rows]` of the product."""
    tokens, columns = inputs.shape
    out, row_bytes = matrix.levels.shape
    tile, part = pl.program_id(0), pl.program_id(1)
    row = tile * config.rows + jnp.arange(config.rows)
    # Those past the end read the last row.
    rows = (row if out % config.rows == 0 else jnp.minimum(row, out - 1))[:, None]
    token = jnp.arange(launch.tile(tokens, _TOKEN_TILE))
    blocks = pl.cdiv(row_bytes, config.block)
    steps = pl.cdiv(blocks, config.splits)

    def block_at(number: Any) -> Block:
        return Block(matrix, rows, jnp.minimum(number, blocks - 1), config.block)

    def visit(i: Any, carry: Any) -> Any:
        total, factors = carry
        number = part * steps + i
        block = Block(matrix, rows, number, config.block)
        levels = block.levels()
        # Those of the next block: they are too few for Triton to load them before it asks.
        following = block_at(number + 1).factors()
        made = block.numbers(levels, factors, inputs.dtype, pairs=config.pairs, interpret=interpret)
        for half, numbers in enumerate(made):
            column = block.columns(half)
            given = plt.load(
                inputs.at[token[:, None], column[None, :]],
                mask=(token < tokens)[:, None] & (column < columns)[None, :],
                other=0,
            )
            total = total + launch.dot(numbers, given, (1, 1))
        return total, following

    zero = jnp.zeros((config.rows, token.shape[0]), jnp.float32)
    end = steps if blocks % config.splits == 0 else jnp.clip(blocks - part * steps, 0, steps)
    total, _ = lax.fori_loop(0, end, visit, (zero, block_at(part * steps).factors()))
    plt.store(
        sums.at[part, token[None, :], row[:, None]],
        total.astype(sums.dtype),
        mask=(token < tokens)[None, :] & (row < out)[:, None],
    )


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
    run = bytes_of_group(matrix)
    if run < _LEAST_RUN or run != launch.tile(run):
        raise NotImplementedError(
            f"multiply_levels: {matrix.group} levels of {matrix.bits} bits are a group; the kernel "
            f"knows groups of 2^n bytes, at least {_LEAST_RUN}"
        )
