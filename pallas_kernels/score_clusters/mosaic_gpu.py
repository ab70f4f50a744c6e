"""`score_clusters` as a Mosaic GPU kernel for Hopper: a program asks for all its centroids at once.

The clusters are the products' rows and the query heads their columns, of which there may be eight.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu_route as route
from pallas_kernels.encode_tokens.reference import rotate
from pallas_kernels.numerics import log_total
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox import mosaic_gpu as toolbox
from pallas_kernels.types import MASKED, ClusterScores


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: clusters multiplied at once, a multiple of 64.
        blocks: how many of them one program has; their centroids are on the way all at once.
    """

    block: int = 64
    blocks: int = 4


def heuristic(rows: int, clusters: int, head_dim: int) -> Config:
    """Choose a config: 64 KiB of centroids a program, if there are programs enough.

    Args:
        rows: sequences times kv heads.
        clusters: room for them in a row, at least 64.
        head_dim: of the heads.
    """
    blocks = max(1, 256 // head_dim * 2)
    while blocks > 1 and (clusters < 64 * blocks or rows * clusters < 132 * 64 * blocks):
        blocks //= 2
    return Config(64, min(blocks, 4))


def _kernel(
    queries: Any,
    centroids: Any,
    offsets: Any,
    layer_ref: Any,
    logits: Any,
    partial: Any,
    query: Any,
    slots: Any,
    scores: Any,
    query_came: Any,
    block_came: Any,
    *,
    scale: float,
    padded: int,
    config: Config,
) -> None:
    """Score a run of a row's clusters.

    Args:
        queries, centroids, offsets, layer_ref: `[heads, head_dim]`, `[layers * rows, clusters,
            head_dim]`, `[layers * rows, clusters + 1]`, `[1]`.
        logits, partial: results, `[rows, group, clusters]` and `[rows, parts, heads of a window]`.
        query, slots, scores: in shared memory, `[heads, head_dim]`, `[blocks, block, head_dim]`,
            `[heads, run]`.
        query_came, block_came: barriers.
        scale, padded, config: of the op, of the window, of the kernel.
    """
    mgpu = route.api()
    heads, (rows, group, clusters) = query.shape[0], logits.shape
    run, layout = config.block * config.blocks, mgpu.Layout.WGMMA
    part, row = lax.axis_index("part"), lax.axis_index("row")
    window, first_head = toolbox.place_in(heads, padded, row)
    mgpu.copy_gmem_to_smem(queries.at[pl.ds(window, heads)], query, query_came)
    own = layer_ref[0] * rows + row
    end = offsets[own, clusters]
    # The last run begins before the end of the one before it, if it would pass the room.
    first = jnp.minimum(part * run, clusters - run)
    at = [first + i * config.block for i in range(config.blocks)]
    in_use = [offsets[own, c] < end for c in at]

    def ask(i: int) -> None:
        source = centroids.at[own, pl.ds(at[i], config.block)]
        mgpu.copy_gmem_to_smem(source, slots.at[i], block_came.at[i])

    # Nothing is read of clusters past the last one in use.
    for i in range(config.blocks):
        pl.when(in_use[i])(functools.partial(ask, i))
    sizes = [_sizes(offsets.at[own], c, config.block, heads) for c in at]

    peak = mgpu.layout_cast(jnp.full((config.block, heads), MASKED, jnp.float32), layout)
    total = mgpu.layout_cast(jnp.zeros((config.block, heads), jnp.float32), layout)
    mgpu.barrier_wait(query_came)
    for i in range(config.blocks):
        pl.when(in_use[i])(functools.partial(mgpu.barrier_wait, block_came.at[i]))
        found = scale * route.products(slots.at[i], query.transpose((1, 0)))
        # A cluster without members may hold anything, NaN included, as a slot without a block.
        found = jnp.where(sizes[i] > 0, found, MASKED)
        target = scores.at[:, pl.ds(i * config.block, config.block)].transpose((1, 0))
        route.store(target, mgpu.layout_cast(found, mgpu.Layout.WGMMA_TRANSPOSED))
        size = sizes[i]
        if clusters % run:
            place = mgpu.broadcasted_iota(jnp.int32, size.shape, 0, layout=layout) + at[i]
            size = jnp.where(place >= part * run, size, 0.0)
        # Each thread keeps sums of its own: those of a head meet at the end.
        higher = jnp.maximum(peak, found)
        total = total * jnp.exp(peak - higher) + size * jnp.exp(found - higher)
        peak = higher
    route.store(partial.at[row, part], _log_total(peak, total))
    mgpu.commit_smem()
    own_scores = scores.at[pl.ds(first_head, group)]
    mgpu.copy_smem_to_gmem(own_scores, logits.at[row, :, pl.ds(first, run)])
    mgpu.wait_smem_to_gmem(0)


def _sizes(offsets: Any, first: Any, block: int, heads: int) -> Any:
    """Load the sizes of clusters from `first` on: float32, `[block, heads]`, for each head anew."""
    layout = route.api().Layout.WGMMA.reduce(1)
    begins = route.load(offsets.at[pl.ds(first, block)], layout)
    ends = route.load(offsets.at[pl.ds(first + 1, block)], layout)
    return lax.broadcast_in_dim((ends - begins).astype(jnp.float32), (block, heads), [0])


def _log_total(peak: Any, total: Any) -> Any:
    """Sum up `[n, heads]` totals, each relative to its peak: the logarithm, `[heads]`."""
    top = jnp.max(peak, axis=0)
    fade = jnp.exp(peak - lax.broadcast_in_dim(top, peak.shape, [1]))
    return log_total(top, jnp.sum(total * fade, axis=0))


def _combine(partial: Any, logsumexp: Any, found: Any, *, parts: int, padded: int) -> None:
    """Sum up a row's parts, `[parts and more, heads]`."""
    mgpu = route.api()
    row, group = lax.axis_index("row"), logsumexp.shape[1]
    _, first_head = toolbox.place_in(partial.shape[2], padded, row)
    each = route.load(partial.at[row], mgpu.Layout.WGMMA)
    part = mgpu.broadcasted_iota(jnp.int32, each.shape, 0, layout=mgpu.Layout.WGMMA)
    # What no program wrote may be anything.
    each = jnp.where(part < parts, each, MASKED)
    counts = jnp.where(each > MASKED / 2, 1.0, jnp.where(each == each, 0.0, each))
    route.store(found, _log_total(each, counts))
    for g in range(group):
        logsumexp[row, g] = found[first_head + g]


def score_clusters(
    query: Array,
    centroids: Array,
    offsets: Array,
    layer: Array | int,
    *,
    scale: float,
    rotated: bool = False,
    directions: Array | None = None,
    covariance: Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> ClusterScores:
    """See `pallas_kernels.score_clusters`.

    Raises:
        NotImplementedError: for head dims, groups, dtypes and GPUs that the kernel is not made for,
            room for less than 64 clusters or no multiple of 8 of them, directions and a
            covariance.
    """
    if directions is not None or covariance is not None:
        raise NotImplementedError(
            "score_clusters: there is no Mosaic GPU kernel for moments and covariances"
        )
    batch, kv_heads, group, head_dim = query.shape
    layers, clusters, rows = centroids.shape[0], centroids.shape[3], batch * kv_heads
    toolbox.check("score_clusters", group, head_dim, query.dtype, centroids.dtype)
    toolbox.check_room("score_clusters", "clusters", clusters, toolbox.ROWS)
    config = config or heuristic(rows, clusters, head_dim)
    run = config.block * config.blocks
    if run > min(clusters, 256):
        raise NotImplementedError(
            f"score_clusters: {config} has programs of {run} clusters, and there is room for "
            f"{clusters}; the Mosaic GPU kernel wants no more than that, nor than 256"
        )
    queries, heads, padded = toolbox.window(query)
    parts = pl.cdiv(clusters, run)
    mgpu, tiles = route.api(), toolbox.swizzled(head_dim)
    logits, partial = route.call(
        functools.partial(_kernel, scale=scale, padded=padded, config=config),
        results=[
            jax.ShapeDtypeStruct((rows, group, clusters), jnp.float32),
            # By tiles of what the second kernel loads at once.
            jax.ShapeDtypeStruct((rows, pl.cdiv(parts, 64) * 64, heads), jnp.float32),
        ],
        scratch=(
            mgpu.SMEM((heads, head_dim), query.dtype, transforms=tiles),
            mgpu.SMEM((config.blocks, config.block, head_dim), query.dtype, transforms=tiles),
            mgpu.SMEM((heads, run), jnp.float32),
            mgpu.Barrier(),
            mgpu.Barrier(num_barriers=config.blocks),
        ),
        grid={"part": parts, "row": rows},
        name="score_clusters",
        interpret=interpret,
    )(
        queries,
        centroids.reshape(layers * rows, clusters, head_dim),
        offsets.reshape(layers * rows, clusters + 1),
        launch.scalar(layer)[None],
    )
    logsumexp = route.call(
        functools.partial(_combine, parts=parts, padded=padded),
        results=[jax.ShapeDtypeStruct((rows, group), jnp.float32)],
        scratch=(mgpu.SMEM((heads,), jnp.float32),),
        grid={"row": rows},
        name="combine_logsumexps",
        interpret=interpret,
    )(partial)[0]
    return ClusterScores(
        logits.reshape(batch, kv_heads, group, clusters),
        logsumexp.reshape(batch, kv_heads, group),
        rotate(query) if rotated else None,
    )
