"""`merge_states` as one Pallas (Triton) kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas, _tuning
from pallas_kernels._numerics import MASKED, log_sum_exp


@dataclasses.dataclass(frozen=True)
class Config:
    """A program merges one query head's parts, so many of them at once. No loop is pipelined."""

    part_tile: int = 32
    num_warps: int = 4


def heuristic(parts: int, head_dim: int) -> Config:
    """All parts at once while they fit the registers: 8192 numbers, 64 a thread."""
    most = 8192 // _pallas.tile(head_dim)
    return Config(part_tile=min(_pallas.tile(parts), most))


def merge_states(
    outputs: Array,
    logsumexps: Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `pallas_kernels.merge_states`.

    Raises:
        NotImplementedError: see `_pallas.check_heads`; or the arrays are not float32.
    """
    parts, batch, kv_heads, group, head_dim = outputs.shape
    if (outputs.dtype, logsumexps.dtype) != (jnp.float32, jnp.float32):
        raise NotImplementedError(
            f"merge_states: outputs are {outputs.dtype}, logsumexps {logsumexps.dtype}; the "
            "kernel knows float32"
        )
    _pallas.check_heads("merge_states", group, head_dim, outputs.dtype)
    if config is None:
        config = _tuning.config(
            "merge_states",
            heuristic(parts, head_dim),
            parts=parts,
            heads=batch * kv_heads * group,
            head_dim=head_dim,
        )
    tile = config.part_tile

    def kernel(outputs: Any, logsumexps: Any, output: Any, logsumexp: Any) -> None:
        at = _pallas.head_of(pl.program_id(0), kv_heads, group)
        d = jnp.arange(_pallas.tile(head_dim))
        part = jnp.arange(_pallas.tile(parts))
        lse = plt.load(logsumexps.at[part, *at], mask=part < parts, other=MASKED)
        total = log_sum_exp(lse, axis=0)

        def step(i: Any, merged: Array) -> Array:
            part = i * tile + jnp.arange(tile)
            lse = plt.load(logsumexps.at[part, *at], mask=part < parts, other=MASKED)
            present = lse > MASKED / 2
            # A part with nothing in it may hold anything, NaN included: it is not read.
            values = plt.load(
                outputs.at[part[:, None], *at, d[None, :]],
                mask=present[:, None] & (d < head_dim)[None, :],
                other=0.0,
            )
            weights = jnp.where(present, jnp.exp(lse - total), 0.0)
            return merged + jnp.sum(weights[:, None] * values, axis=0)

        start = jnp.zeros(d.shape, jnp.float32)
        merged = lax.fori_loop(0, pl.cdiv(parts, tile), step, start)
        plt.store(output.at[*at, d], merged, mask=d < head_dim)
        logsumexp[*at] = total

    output, logsumexp = _pallas.call(
        kernel,
        [outputs, logsumexps],
        (
            jax.ShapeDtypeStruct(outputs.shape[1:], jnp.float32),
            jax.ShapeDtypeStruct(logsumexps.shape[1:], jnp.float32),
        ),
        (batch * kv_heads * group,),
        name="merge_states",
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return output, logsumexp
