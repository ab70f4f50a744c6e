"""`score_clusters` as a Pallas kernel for TPUs: a row's clusters come block by block."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.encode_tokens.reference import rotate
from pallas_kernels.numerics import log_total
from pallas_kernels.toolbox import launch, mosaic
from pallas_kernels.types import MASKED, ClusterScores


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: clusters scored at once, a multiple of 128; all for more than there are.
    """

    block: int = 1024


def _kernel(
    layer_ref: Any,
    ends_ref: Any,
    query_ref: Any,
    centroids_ref: Any,
    sizes_ref: Any,
    logits_ref: Any,
    logsumexp_ref: Any,
    peak_ref: Any,
    total_ref: Any,
    *,
    scale: float,
) -> None:
    """Score a block of a row's clusters; after the row's last one, sum them up."""
    del layer_ref  # the blocks' specs read it
    part = pl.program_id(2)
    end = ends_ref[pl.program_id(0), pl.program_id(1)]
    block = centroids_ref.shape[0]

    @pl.when(part == 0)
    def start() -> None:
        peak_ref[...] = jnp.full(peak_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(part * block >= end)
    def skip() -> None:
        logits_ref[...] = jnp.full(logits_ref.shape, MASKED, jnp.float32)

    @pl.when(part * block < end)
    def score() -> None:
        # The last block may reach past the clusters, where anything may be.
        sizes = jnp.where(mosaic.places(part, block) < end, sizes_ref[...], 0)
        logits = scale * mosaic.dot(query_ref[...], centroids_ref[...], (1, 1))
        # A cluster without members may hold anything, NaN included.
        logits = jnp.where(sizes > 0, logits, MASKED)
        logits_ref[...] = logits
        peak = peak_ref[...]
        higher = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - higher) * sizes.astype(jnp.float32)
        added = jnp.sum(weights, axis=1, keepdims=True)
        total_ref[...] = total_ref[...] * jnp.exp(peak - higher) + added
        peak_ref[...] = higher

    @pl.when(part == pl.num_programs(2) - 1)
    def finish() -> None:
        logsumexp_ref[...] = log_total(peak_ref[...], total_ref[...])


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
        NotImplementedError: for head dims, groups and dtypes that the kernel is not made for, for
            no clusters, and for directions and a covariance.
    """
    if directions is not None or covariance is not None:
        raise NotImplementedError(
            "score_clusters: there is no kernel for moments and covariances yet"
        )
    batch, kv_heads, group, head_dim = query.shape
    clusters = centroids.shape[3]
    mosaic.check_heads("score_clusters", group, head_dim, query.dtype, centroids.dtype)
    if not centroids.size:
        raise NotImplementedError(f"score_clusters: centroids are empty: {centroids.shape}")
    block = min((config or Config()).block, clusters)
    sizes = jnp.diff(offsets[layer], axis=-1)
    ends = mosaic.end_of(sizes > 0)

    def at(b: Any, h: Any, part: Any, layer: Any, ends: Any) -> tuple[Any, ...]:
        # Past the last cluster in use the same block again, which is not read again.
        return layer[0], b, h, jnp.minimum(part, mosaic.last_block(ends[b, h], block)), 0

    def per_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h, part, *_: (b, h, 0, 0))

    def per_part(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, block), lambda b, h, part, *_: (b, h, 0, part))

    heads = (batch, kv_heads, group)
    logits, logsumexp = backend.tpu_call(
        functools.partial(_kernel, scale=scale),
        scalars=2,
        scratch=(backend.vector_memory((group, 1), jnp.float32),) * 2,
        interpret=interpret,
        grid=(batch, kv_heads, pl.cdiv(clusters, block)),
        in_specs=[
            per_row(group, head_dim),
            pl.BlockSpec((None, None, None, block, head_dim), at),
            per_part(1),
        ],
        out_specs=[per_part(group), per_row(group, 1)],
        out_shape=[
            jax.ShapeDtypeStruct((*heads, clusters), jnp.float32),
            jax.ShapeDtypeStruct((*heads, 1), jnp.float32),
        ],
        name="score_clusters",
    )(launch.scalar(layer)[None], ends, query, centroids, sizes[:, :, None])
    return ClusterScores(logits, logsumexp[..., 0], rotate(query) if rotated else None)
