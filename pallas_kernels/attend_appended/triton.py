"""`attend_appended` as a Triton kernel: flash attention, a program for each split and query block.

Rows are read where they lie. The splits are of the rows that there is most room for; one part more
takes in all others, among which are the new tokens' own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.merge_states import triton as merging
from pallas_kernels.numerics import log_total
from pallas_kernels.toolbox import launch, online_softmax
from pallas_kernels.toolbox.online_softmax import Vectors
from pallas_kernels.types import KeptRows


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        splits: parts that the rows of most room are cut into, each for programs of its own.
        queries: rows of the product's left side, new tokens times query heads, of a program.
        block: rows that a program attends to at once.
        num_warps, num_stages: see Triton.
    """

    splits: int
    queries: int = 128
    block: int = 64
    num_warps: int = 8
    num_stages: int = 2


def heuristic(queries: int, kv_heads: int, room: int, head_dim: int, itemsize: int) -> Config:
    """Fill an H200's processors in one wave of programs, or in three where one would be uneven.

    A wave that is begun takes as long as a full one, so splits are rounded down. One part is that
    of the other rows.

    Args:
        queries: new tokens times the query heads that share a kv head.
        kv_heads: of the model.
        room: the most rows of one kind.
        head_dim: of the heads.
        itemsize: bytes of a number as it is multiplied: the query's, also for levels.
    """
    width = launch.tile(head_dim)
    row_bytes = width * itemsize
    if itemsize < 4:
        # 32 KiB of queries, and of keys and values at once.
        tile, block = 32768 // row_bytes, 16384 // row_bytes
    else:
        # Not for the matrix units: tiles of twice this do not fit the registers.
        tile = block = 8192 // row_bytes
    tile = max(launch.DOT_TILE, min(128, tile, launch.tile(queries)))
    block = max(launch.DOT_TILE, min(64, block))
    # So many registers does a program take that a processor holds two at a time.
    at_once = 2 * 132
    programs = -(-queries // tile) * kv_heads
    waves = 1 if at_once >= 12 * programs else 3
    splits = max(1, min(waves * at_once // programs - 1, room // (4 * block)))
    narrow = width <= 64
    warps = max(4, tile // 16) if narrow else 4
    return Config(splits, tile, block, num_warps=warps, num_stages=3 if narrow else 2)


def _kernel(
    query: Any,
    kept: Any,
    count_ref: Any,
    sequence_ref: Any,
    layer_ref: Any,
    outputs: Any,
    logsumexps: Any,
    *,
    large: int,
    scale: float,
    config: Config,
) -> None:
    """One part of one block of queries: online softmax over its rows.

    Args:
        query: `[tokens, kv_heads, group, head_dim]`.
        kept: `KeptRows` of refs, the new tokens' own first.
        count_ref, sequence_ref, layer_ref: numbers.
        outputs, logsumexps: results, `[parts, tokens, kv_heads, group, head_dim]` and without dims.
        large: which of `kept` is cut into splits.
        scale, config: of the op, of the kernel.
    """
    part, head = pl.program_id(0), pl.program_id(2)
    tokens, _, group, head_dim = query.shape
    sequence, at = sequence_ref[...], (layer_ref[...], sequence_ref[...], head)
    place = pl.program_id(1) * config.queries + jnp.arange(config.queries)
    token, member = place // group, place % group
    dims = jnp.arange(launch.tile(head_dim))
    in_dims = dims < head_dim
    mask = (token < tokens)[:, None] & in_dims[None, :]
    own_query = query.at[token[:, None], head, member[:, None], dims[None, :]]
    q = plt.load(own_query, mask=mask, other=0.0)

    def take_in(which: int, carry: Any) -> Any:
        """Attend to one kind of rows, as far as they are this part's."""
        rows = kept[which]
        if rows.values is None:
            keys, values = Vectors(rows.keys, (0,)), Vectors(rows.keys, (1,))
        else:
            keys, values = Vectors(rows.keys), Vectors(rows.values)
        used = plt.load(rows.tokens.at[sequence])
        length = jnp.minimum(used + count_ref[...] if which == 0 else used, rows.room)
        blocks = pl.cdiv(jnp.maximum(length, 0), config.block)
        if which == large:
            # The sequence's own rows are cut evenly; of the last part there are none of these.
            each = pl.cdiv(blocks, config.splits)
            first = part * each
            here = jnp.clip(blocks - first, 0, each)
        else:
            first = jnp.int32(0)
            here = jnp.where(part == config.splits, blocks, 0)

        def visit(i: Any, carry: Any) -> Any:
            row = (first + i) * config.block + jnp.arange(config.block)
            exists = row < length
            seen = exists[None, :]
            if which == 0:
                seen = seen & (row[None, :] <= used + token[:, None])
            block = keys, values, at, row, exists, seen, dims, in_dims, scale
            return online_softmax.take_in(carry, q, *block)

        return lax.fori_loop(0, here, visit, carry)

    carry: Any = online_softmax.nothing(config.queries, dims.shape[0])
    for which in range(len(kept)):
        carry = take_in(which, carry)
    total, weight, peak = carry
    plt.store(
        outputs.at[part, token[:, None], head, member[:, None], dims[None, :]],
        total / jnp.where(weight == 0, 1.0, weight)[:, None],
        mask=mask,
    )
    own_logsumexp = logsumexps.at[part, token, head, member]
    plt.store(own_logsumexp, log_total(peak, weight), mask=token < tokens)


def attend_appended(
    query: Array,
    own: KeptRows,
    others: Sequence[KeptRows],
    count: Array | int,
    sequence: Array | int,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """See `pallas_kernels.attend_appended`.

    Raises:
        NotImplementedError: see `launch.check_heads`; or query and rows differ in dtype, but for
            levels; or there are levels, and the query is in float16.
    """
    tokens, kv_heads, group, head_dim = query.shape
    kept = check(query, own, others)
    rooms = [rows.room for rows in kept]
    if config is None:
        config = tuning.config(
            "attend_appended",
            heuristic(tokens * group, kv_heads, max(rooms), head_dim, query.dtype.itemsize),
            queries=tokens * group,
            kv_heads=kv_heads,
            rooms=max(rooms),
            head_dim=head_dim,
            dtype=query.dtype.name,
        )
    parts = (config.splits + (len(kept) > 1), tokens, kv_heads, group)
    large = rooms.index(max(rooms))
    outputs, logsumexps = launch.call(
        functools.partial(_kernel, large=large, scale=scale, config=config),
        (query, kept, *map(launch.scalar, (count, sequence, layer))),
        (
            jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        (parts[0], pl.cdiv(tokens * group, config.queries), kv_heads),
        name="attend_appended",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    if parts[0] == 1:
        return outputs[0].astype(query.dtype)
    merge = functools.partial(merging.merge_states, dtype=query.dtype, interpret=interpret)
    return merge(outputs, logsumexps)[0]


def check(query: Array, own: KeptRows, others: Sequence[KeptRows]) -> tuple[KeptRows, ...]:
    """Return the rows that there is room for, the new tokens' own first.

    Raises:
        NotImplementedError: see `attend_appended`, and `launch.check_addressable`.
    """
    _, _, group, head_dim = query.shape
    launch.check_heads("attend_appended", group, head_dim, query.dtype)
    # Without a row there is nothing to load.
    kept = (own, *(rows for rows in others if rows.room))
    for rows in kept:
        _check(query, rows)
    launch.check_addressable("attend_appended", kept)
    return kept


def _check(query: Array, kept: KeptRows) -> None:
    """Raise NotImplementedError for rows that the kernel does not read."""
    for rows in (kept.keys, kept.values or kept.keys):
        wanted = query.dtype if rows.scales is None else jnp.int8
        if rows.dtype != wanted:
            raise NotImplementedError(
                f"attend_appended: query is {query.dtype}, rows are {rows.dtype}; the kernel knows "
                "one dtype for both, and int8 where rows have scales"
            )
        if rows.scales is not None and query.dtype == jnp.float16:
            raise NotImplementedError(
                "attend_appended: rows have scales and query is float16, which does not hold "
                "weights times scales; the kernel wants bfloat16 or float32"
            )
