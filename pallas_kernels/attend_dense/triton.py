"""`attend_dense` as a Triton kernel: flash decoding, a program for each split of a row's tokens."""

import dataclasses
import functools
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
from pallas_kernels.types import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        splits: parts that a row's tokens are cut into, each a program's; merged afterwards.
        block: tokens that a program attends to at once.
        num_warps, num_stages: see Triton.
    """

    splits: int
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


def heuristic(rows: int, tokens: int, head_dim: int, itemsize: int) -> Config:
    """Four programs for each of an H200's processors, if each then has four blocks to attend to.

    Args:
        rows: sequences times kv heads.
        tokens: room of a sequence.
        head_dim: of the heads.
        itemsize: bytes of a number as it is multiplied: the query's, also for levels.
    """
    # 16 KiB of keys and of values at once: three stages of both are 96 KiB of shared memory.
    block = 16384 // (launch.tile(head_dim) * itemsize)
    block = min(max(block, launch.DOT_TILE), 64, launch.tile(tokens, launch.DOT_TILE))
    splits = min(-(-4 * 132 // rows), tokens // (4 * block))
    return Config(max(1, splits), block)


def _kernel(
    query: Any,
    keys: Any,
    values: Any,
    lengths: Any,
    layer_ref: Any,
    outputs: Any,
    logsumexps: Any,
    *,
    scale: float,
    config: Config,
) -> None:
    """One split of one row: online softmax over its tokens; keys and values are `Rows` of refs."""
    part, head, sequence = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, head_dim = query.shape[2:]
    at = layer_ref[...], sequence, head
    # Each sequence's own tokens are cut evenly, so that none of its programs is left without.
    length = jnp.minimum(plt.load(lengths.at[sequence]), keys.shape[3])
    blocks = pl.cdiv(pl.cdiv(length, config.block), config.splits)
    heads = jnp.arange(launch.tile(group, launch.DOT_TILE))
    dims = jnp.arange(launch.tile(head_dim))
    in_group, in_dims = heads < group, dims < head_dim
    q = plt.load(
        query.at[sequence, head, heads[:, None], dims[None, :]],
        mask=in_group[:, None] & in_dims[None, :],
        other=0.0,
    )

    def visit(i: Any, carry: Any) -> Any:
        token = (part * blocks + i) * config.block + jnp.arange(config.block)
        seen = token < length
        block = at, token, seen, seen[None, :], dims, in_dims, scale
        return online_softmax.take_in(carry, q, Vectors(keys), Vectors(values), *block)

    start = online_softmax.nothing(heads.shape[0], dims.shape[0])
    total, weight, peak = lax.fori_loop(0, blocks, visit, start)
    plt.store(
        outputs.at[part, sequence, head, heads[:, None], dims[None, :]],
        total / jnp.where(weight == 0, 1.0, weight)[:, None],
        mask=in_group[:, None] & in_dims[None, :],
    )
    logsumexp = log_total(peak, weight)
    plt.store(logsumexps.at[part, sequence, head, heads], logsumexp, mask=in_group)


def attend_dense(
    query: Array,
    keys: Rows,
    values: Rows,
    lengths: Array,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `pallas_kernels.attend_dense`.

    Raises:
        NotImplementedError: see `launch.check_heads`; or query, keys and values differ in dtype or
            format, but for levels; or there are levels, and the query is in float16.
    """
    batch, kv_heads, group, head_dim = query.shape
    tokens = keys.shape[3]
    launch.check_heads("attend_dense", group, head_dim, query.dtype)
    scaled = keys.scales is not None
    wanted = jnp.int8 if scaled else query.dtype
    if keys.format != values.format or not wanted == keys.dtype == values.dtype:
        raise NotImplementedError(
            f"attend_dense: query is {query.dtype}, keys are {keys.dtype}, values {values.dtype}; "
            "the kernel knows one dtype for all, and int8 where keys and values have scales"
        )
    if scaled and query.dtype == jnp.float16:
        raise NotImplementedError(
            "attend_dense: keys and values have scales and query is float16, which does not hold "
            "weights times scales; the kernel wants bfloat16 or float32"
        )
    if config is None:
        config = tuning.config(
            "attend_dense",
            heuristic(batch * kv_heads, tokens, head_dim, query.dtype.itemsize),
            rows=batch * kv_heads,
            tokens=tokens,
            head_dim=head_dim,
            dtype=query.dtype.name + ("-levels" if scaled else ""),
        )
    heads = (config.splits, batch, kv_heads, group)
    outputs, logsumexps = launch.call(
        functools.partial(_kernel, scale=scale, config=config),
        (query, keys, values, lengths.astype(jnp.int32), launch.scalar(layer)),
        (
            jax.ShapeDtypeStruct((*heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
        ),
        (config.splits, kv_heads, batch),
        name="attend_dense",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    if config.splits == 1:
        return outputs[0], logsumexps[0]
    return merging.merge_states(outputs, logsumexps, interpret=interpret)
