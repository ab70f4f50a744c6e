"""`merge_states` as one Pallas (Triton) kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.numerics import is_masked, log_sum_exp
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. No loop is pipelined.

    Attributes:
        part_tile: parts that a program merges at once.
        dim_tile: so many dimensions of one query head are one program's.
        num_warps: see Triton.
    """

    part_tile: int = 32
    dim_tile: int = 128
    num_warps: int = 4


def heuristic(parts: int, head_dim: int) -> Config:
    """All parts at once, up to 256, and as many dimensions as keep them in 64 registers."""
    part_tile = min(launch.tile(parts), 256)
    dim_tile = min(max(4096 // part_tile, 32), launch.tile(head_dim))
    return Config(part_tile, dim_tile)


def merge_states(
    outputs: Array,
    logsumexps: Array,
    *,
    dtype: DTypeLike = jnp.float32,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `pallas_kernels.merge_states`.

    Raises:
        NotImplementedError: see `launch.check_heads`; or the arrays are not float32.
    """
    parts, batch, kv_heads, group, head_dim = outputs.shape
    if {outputs.dtype.name, logsumexps.dtype.name} != {"float32"}:
        raise NotImplementedError(
            f"merge_states: outputs are {outputs.dtype}, logsumexps {logsumexps.dtype}; the "
            "kernel knows float32"
        )
    launch.check_heads("merge_states", group, head_dim, outputs.dtype)
    if config is None:
        config = tuning.config(
            "merge_states",
            heuristic(parts, head_dim),
            parts=parts,
            heads=batch * kv_heads * group,
            head_dim=head_dim,
        )
    tile, dims = config.part_tile, config.dim_tile

    def kernel(outputs: Any, logsumexps: Any, output: Any, logsumexp: Any) -> None:
        at = launch.head_of(pl.program_id(1), kv_heads, group)
        d = pl.program_id(0) * dims + jnp.arange(dims)
        part = jnp.arange(launch.tile(parts))
        lse = plt.load(logsumexps.at[part, *at], mask=part < parts, other=MASKED)
        total = log_sum_exp(lse, axis=0)

        def step(i: Any, merged: Array) -> Array:
            part = i * tile + jnp.arange(tile)
            exists = part < parts
            # Not for the parts alone that have something in them: then the one load would wait
            # for the other.
            values = plt.load(
                outputs.at[part[:, None], *at, d[None, :]],
                mask=exists[:, None] & (d < head_dim)[None, :],
                other=0.0,
            )
            lse = plt.load(logsumexps.at[part, *at], mask=exists, other=MASKED)
            present = ~is_masked(lse)
            weights = jnp.where(present, jnp.exp(lse - total), 0.0)
            # A part with nothing in it may hold anything, NaN included.
            values = jnp.where(present[:, None], values, 0.0)
            return merged + jnp.sum(weights[:, None] * values, axis=0)

        start = jnp.zeros(d.shape, jnp.float32)
        if parts <= tile:
            merged = step(jnp.int32(0), start)
        else:
            merged = lax.fori_loop(0, pl.cdiv(parts, tile), step, start)
        plt.store(output.at[*at, d], merged.astype(dtype), mask=d < head_dim)
        logsumexp[*at] = total

    output, logsumexp = launch.call(
        kernel,
        [outputs, logsumexps],
        (
            jax.ShapeDtypeStruct(outputs.shape[1:], dtype),
            jax.ShapeDtypeStruct(logsumexps.shape[1:], jnp.float32),
        ),
        (pl.cdiv(head_dim, dims), batch * kv_heads * group),
        name="merge_states",
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return output, logsumexp
