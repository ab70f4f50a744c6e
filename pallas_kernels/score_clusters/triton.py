"""`score_clusters` as a Triton kernel: one program scores a run of a row's clusters.

With directions, or a covariance, other programs of the same launch multiply the query with a run of
them. A cluster's directions lie side by side, so a run of them is a matrix as centroids are, and
its products are one piece of memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.encode_tokens.reference import rotate
from pallas_kernels.numerics import log_sum_exp, log_total
from pallas_kernels.score_clusters._config import Config, heuristic, of_covariance
from pallas_kernels.score_clusters._products import load_query, multiply_vectors, product_dtype
from pallas_kernels.score_tokens._query import packed_shapes, rotate_and_pack, rotations
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, ClusterScores, PackedQuery

__all__ = ["Config", "heuristic", "score_clusters"]


def _kernel(
    query_ref: Any,
    centroids_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    rotations_ref: Any,
    directions_ref: Any,
    covariance_ref: Any,
    logits_ref: Any,
    partial_ref: Any,
    packed: PackedQuery | None,
    products_ref: Any,
    pooled_ref: Any,
    *,
    scale: float,
    config: Config,
) -> None:
    """Scores a run of clusters or other vectors; or rotates and packs the query, if asked to."""
    kv_heads = query_ref.shape[1]
    part, row = pl.program_id(0), pl.program_id(1)

    def score(part: Any) -> None:
        refs = query_ref, centroids_ref, offsets_ref, layer_ref, logits_ref, partial_ref
        _score(*refs, part=part, row=row, scale=scale, config=config)

    # First, since it takes longer to begin than the others.
    if packed is not None:

        @pl.when(part == 0)
        def turn() -> None:
            at = row // kv_heads, row % kv_heads
            rotate_and_pack(query_ref, rotations_ref, packed, *at, scale=scale)

    kinds: list[tuple[Any, Any]] = [(partial_ref.shape[3], score)]
    for refs, cut in (
        ((directions_ref, offsets_ref, products_ref), config),
        ((covariance_ref, None, pooled_ref), of_covariance(config)),
    ):
        if refs[0] is not None:
            vectors, known, into = refs
            given = query_ref, vectors, known, layer_ref, into
            multiply = functools.partial(multiply_vectors, *given, row=row, scale=scale, config=cut)
            runs = pl.cdiv(vectors.shape[3], cut.block * cut.blocks)
            kinds.append((runs, lambda part, multiply=multiply: multiply(part=part)))
    first = 0 if packed is None else 1
    if not first and len(kinds) == 1:
        score(part)
        return
    for count, kind in kinds:
        inside = (part >= first) & (part < first + count)
        pl.when(inside)(functools.partial(kind, part - first))
        first += count


def _score(
    query_ref: Any,
    centroids_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    logits_ref: Any,
    partial_ref: Any,
    *,
    part: Any,
    row: Any,
    scale: float,
    config: Config,
) -> None:
    """Scores a run of a row's clusters."""
    _, kv_heads, group, _ = query_ref.shape
    clusters = centroids_ref.shape[3]
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    g, dim, in_dim, query = load_query(query_ref, b, h)
    end = plt.load(offsets_ref.at[layer, b, h, jnp.int32(clusters)])

    def visit(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        peak, total = state
        first = (part * config.blocks + i) * config.block
        c = first + jnp.arange(config.block)
        exists = c < clusters
        begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
        sizes = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins
        # Nothing is read of clusters past the last one in use.
        in_use = exists & (begins < end)
        centroids = plt.load(
            centroids_ref.at[layer, b, h, c[:, None], dim[None, :]],
            mask=in_use[:, None] & in_dim[None, :],
            other=0,
        )
        logits = scale * launch.dot(query, centroids, (1, 1))
        # A cluster without members may hold anything, NaN included.
        logits = jnp.where((sizes > 0)[None, :], logits, MASKED)
        plt.store(logits_ref.at[b, h, g, c[None, :]], logits, mask=(g < group) & exists[None, :])
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - higher[:, None]) * sizes.astype(jnp.float32)[None, :]
        return higher, total * jnp.exp(peak - higher) + jnp.sum(weights, axis=1)

    empty = (
        jnp.full(launch.DOT_TILE, MASKED, jnp.float32),
        jnp.zeros(launch.DOT_TILE, jnp.float32),
    )
    peak, total = lax.fori_loop(0, config.blocks, visit, empty)
    row_g = jnp.arange(launch.DOT_TILE)
    plt.store(partial_ref.at[b, h, row_g, part], log_total(peak, total), mask=row_g < group)


def _combine(partial_ref: Any, logsumexp_ref: Any) -> None:
    _, kv_heads, group, parts = partial_ref.shape
    at = launch.head_of(pl.program_id(0), kv_heads, group)
    part = jnp.arange(launch.tile(parts))
    partial = plt.load(partial_ref.at[*at, part], mask=part < parts, other=MASKED)
    plt.store(logsumexp_ref.at[at], log_sum_exp(partial, axis=0))


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
        NotImplementedError: for head dims, groups and dtypes that the kernel is not made for.
    """
    batch, kv_heads, group, head_dim = query.shape
    clusters = centroids.shape[3]
    launch.check_heads("score_clusters", group, head_dim, query.dtype, centroids.dtype)
    rows = batch * kv_heads
    dtype, widest, rank, more = jnp.dtype(centroids.dtype).name, centroids.dtype, 0, {}
    if directions is not None:
        launch.check_vectors("score_clusters", "directions", directions)
        rank = directions.shape[4]
        widest = product_dtype(centroids.dtype, directions.dtype)
        more = {"rank": rank, "directions": directions.dtype.name}
        directions = directions.reshape(*directions.shape[:3], clusters * rank, head_dim)
    if covariance is not None:
        launch.check_vectors("score_clusters", "the covariance", covariance)
        covariance = covariance.reshape(*covariance.shape[:3], 2 * head_dim, head_dim)
    config = config or tuning.config(
        "score_clusters",
        heuristic(rows, clusters, head_dim, jnp.dtype(widest).name),
        rows=rows,
        clusters=clusters,
        head_dim=head_dim,
        dtype=dtype,
        **more,
    )
    parts = pl.cdiv(clusters, config.block * config.blocks)
    runs = pl.cdiv(clusters * rank, config.block * config.blocks)
    if covariance is not None:
        runs += pl.cdiv(2 * head_dim, of_covariance(config).block)
    heads = (batch, kv_heads, group)
    # As `score_tokens` multiplies codes: with float32 scales it takes the query as it is.
    floats = dtype == "float32" or query.dtype == jnp.float32
    packs = rotated and not floats and plt.takes_assembly()
    logits, partial, packed, products, pooled = launch.call(
        functools.partial(_kernel, scale=scale, config=config),
        (
            *(query.astype(centroids.dtype), centroids, offsets, launch.scalar(layer)),
            jnp.asarray(rotations(head_dim)) if packs else None,
            directions,
            covariance,
        ),
        (
            jax.ShapeDtypeStruct((*heads, clusters), jnp.float32),
            jax.ShapeDtypeStruct((*heads, parts), jnp.float32),
            packed_shapes(*query.shape) if packs else None,
            jax.ShapeDtypeStruct((*heads, clusters * rank), jnp.float32) if rank else None,
            None
            if covariance is None
            else jax.ShapeDtypeStruct((*heads, 2 * head_dim), jnp.float32),
        ),
        (packs + parts + runs, rows),
        name="score_clusters",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    turned: Array | PackedQuery | None = packed
    if rotated and not packs:
        turned = rotate(query)
    # One kernel, where XLA would make three of it.
    logsumexp = launch.call(
        _combine,
        (partial,),
        jax.ShapeDtypeStruct(heads, jnp.float32),
        (rows * group,),
        name="combine_logsumexps",
        num_warps=1,
        interpret=interpret,
    )
    if products is not None:
        products = products.reshape(*heads, clusters, rank)
    if pooled is not None:
        pooled = pooled.reshape(*heads, 2, head_dim)
    return ClusterScores(logits, logsumexp, turned, products, pooled)
