"""`attend_zones` as one Pallas kernel for TPUs, of rows in the device's memory.

A program attends to one kv head's three zones. Rows come by copies that the program starts itself:
those of the window tile by tile, the retrieved ones one by one. The next tile is copied while one
is worked on. The clusters' mean values come block by block, by the grid.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.attend_zones._tpu_zones import PARTS, Refs, attend_block, attend_rows
from pallas_kernels.toolbox import launch, mosaic
from pallas_kernels.types import NO_ID, Estimate, Picks, SteadyRows, StoredRows, ZoneStates


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut; each a multiple of 128.

    Attributes:
        steady_tile, retrieved_tile: rows that are copied and attended to at once.
        cluster_block: clusters attended to at once; all for more than there are.
    """

    steady_tile: int = 256
    retrieved_tile: int = 128
    cluster_block: int = 1024


def attend_zones(
    query: Array,
    steady: SteadyRows,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> ZoneStates:
    """See `pallas_kernels.attend_zones`.

    Raises:
        NotImplementedError: see `mosaic.check_heads`; or a row cache, a store in host memory, rows
            in 8 bits or of several dtypes, no room for retrieved rows, clusters or the window, or a
            correction of the estimate.
    """
    batch, kv_heads, group, head_dim = query.shape
    sink, sink_tokens, window, window_tokens = steady
    if any(held.scales is not None for held in rows):
        raise NotImplementedError(
            "attend_zones: rows in 8 bits; the TPU's kernel wants them in the query's dtype"
        )
    store, cache = (held.data for held in rows)
    logits, value_means, offsets, remaining, correction, pooled = estimate
    if correction is not None or pooled is not None:
        raise NotImplementedError(
            "attend_zones: there is no kernel for moments and covariances yet"
        )
    mosaic.check_heads("attend_zones", group, head_dim, query.dtype, value_means.dtype)
    if cache.size or jax.typeof(store).memory_space == jax.memory.Space.Host:
        raise NotImplementedError(
            "attend_zones: a row cache, or a store in host memory; the TPU's kernel wants all "
            "rows in the store, on the device"
        )
    for name, array in {"sink": sink, "window": window, "store": store}.items():
        if array.dtype != query.dtype:
            raise NotImplementedError(
                f"attend_zones: {name} is {array.dtype}, query {query.dtype}; the kernel wants "
                "one dtype"
            )
    rooms = {"window": window, "store": store, "tokens": picks.tokens, "remaining": remaining}
    for name, array in rooms.items():
        if not array.size:
            raise NotImplementedError(f"attend_zones: {name} is empty: {array.shape}")
    config = config or Config()
    clusters = remaining.shape[2]
    block = min(config.cluster_block, clusters)
    tile = config.retrieved_tile
    room = tile * pl.cdiv(picks.tokens.shape[2], tile)
    missing = ((0, 0), (0, 0), (0, room - picks.tokens.shape[2]))
    tokens = jnp.pad(picks.tokens, missing, constant_values=NO_ID)
    members = jnp.minimum(remaining, jnp.diff(offsets[layer], axis=-1))
    ends = mosaic.end_of(members > 0)

    def per_row(*shape: int, memory: Any = None) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *shape), lambda b, h, part, *_: (b, h, 0, 0), memory_space=memory
        )

    def block_of(ends: Any, b: Any, h: Any, part: Any) -> Any:
        # Past the last cluster that counts the same block again, which is not read again.
        return jnp.minimum(part, mosaic.last_block(ends[b, h], block))

    def per_part(size: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, size, block),
            lambda b, h, part, layer, ends, *_: (b, h, 0, block_of(ends, b, h, part)),
        )

    def result(width: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        spec = pl.BlockSpec(
            (PARTS, None, None, group, width), lambda b, h, part, *_: (0, b, h, 0, 0)
        )
        return spec, jax.ShapeDtypeStruct((PARTS, *query.shape[:3], width), jnp.float32)

    means = pl.BlockSpec(
        (None, None, None, block, head_dim),
        lambda b, h, part, layer, ends, *_: (layer[0], b, h, block_of(ends, b, h, part), 0),
    )
    stays = pl.BlockSpec(memory_space=pl.ANY)
    out_specs, out_shape = zip(result(head_dim), result(1), strict=True)
    vector, semaphores = backend.vector_memory, backend.copy_semaphores((2,))
    width = (2, head_dim)
    outputs, logsumexps = backend.tpu_call(
        functools.partial(_kernel, scale=scale),
        scalars=5,
        scratch=(
            vector((2, config.steady_tile, *width), query.dtype),
            vector((2, tile, *width), query.dtype),
            semaphores,
            semaphores,
            vector((group, head_dim), jnp.float32),
            vector((group, 1), jnp.float32),
            vector((group, 1), jnp.float32),
        ),
        interpret=interpret,
        grid=(batch, kv_heads, pl.cdiv(clusters, block)),
        in_specs=[
            per_row(group, head_dim),
            stays,
            stays,
            stays,
            per_row(1, room, memory=backend.scalar_memory),
            per_row(1, room),
            per_part(group),
            means,
            per_part(1),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        name="attend_zones",
    )(
        launch.scalar(layer)[None],
        ends,
        mosaic.end_of(tokens != NO_ID),
        jnp.minimum(sink_tokens, sink.shape[3]),
        jnp.minimum(window_tokens, window.shape[3]),
        query,
        sink if sink.size else window,  # an operand cannot be empty
        window,
        store,
        tokens[:, :, None],
        tokens[:, :, None],
        logits,
        value_means,
        members[:, :, None],
    )
    return ZoneStates(outputs, logsumexps[..., 0], rows.cache)


def _kernel(*refs: Any, scale: float) -> None:
    """Attend to the steady and the retrieved zone first, then to a block of clusters each time."""
    program = Refs(*refs)
    pl.when(pl.program_id(2) == 0)(lambda: attend_rows(program, scale))
    attend_block(program)
