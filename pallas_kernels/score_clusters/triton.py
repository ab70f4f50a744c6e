"""`score_clusters` as a Triton kernel: one program scores a run of a row's clusters.

With directions other programs of the same launch multiply the query with a run of them. A cluster's
directions lie side by side, so a run of them is a matrix as centroids are, and its products are one
piece of memory.
"""

import dataclasses
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
from pallas_kernels.score_tokens._query import packed_shapes, rotate_and_pack, rotations
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, ClusterScores, PackedQuery


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: clusters scored at once.
        blocks: how many times one program does so.
        num_warps, num_stages: see Triton.
    """

    block: int = 128
    blocks: int = 1
    num_warps: int = 4
    num_stages: int = 3


def heuristic(rows: int, clusters: int, head_dim: int, dtype: str) -> Config:
    """Choose a config for shapes that were not tuned."""
    block = 128 if head_dim <= 128 else 64
    if dtype == "float32":
        # Its products are made one by one, in registers.
        block //= 4
    block = min(block, launch.tile(clusters, launch.DOT_TILE))
    # Where there are programs enough, each loads its next block while it works on one.
    return Config(block, blocks=2 if rows * clusters >= 1024 * block else 1)


def _kernel(
    query_ref: Any,
    centroids_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    rotations_ref: Any,
    directions_ref: Any,
    logits_ref: Any,
    partial_ref: Any,
    packed: PackedQuery | None,
    products_ref: Any,
    *,
    scale: float,
    config: Config,
) -> None:
    """Scores a run of clusters or directions; or rotates and packs the query, where asked for."""
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

    first = 0 if packed is None else 1
    if products_ref is not None:
        end = first + partial_ref.shape[3]
        refs = query_ref, directions_ref, offsets_ref, layer_ref, products_ref
        multiply = functools.partial(_multiply, *refs, row=row, scale=scale, config=config)
        pl.when(part >= end)(lambda: multiply(part=part - end))
        pl.when((part >= first) & (part < end))(lambda: score(part - first))
    elif packed is not None:
        pl.when(part > 0)(lambda: score(part - 1))
    else:
        score(part)


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
    g, dim, in_dim, query = _load_query(query_ref, b, h)
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


def _load_query(query_ref: Any, b: Any, h: Any) -> tuple[Any, Any, Any, Any]:
    """Load a row's queries `[g, dim]`: g, dim, which dims there are, and the queries."""
    _, _, group, head_dim = query_ref.shape
    g = jnp.arange(launch.DOT_TILE)[:, None]
    dim = jnp.arange(launch.tile(head_dim))
    in_dim = dim < head_dim
    query = plt.load(
        query_ref.at[b, h, g, dim[None, :]],
        mask=(g < group) & in_dim[None, :],
        other=0,
    )
    return g, dim, in_dim, query


def _multiply(
    query_ref: Any,
    directions_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    products_ref: Any,
    *,
    part: Any,
    row: Any,
    scale: float,
    config: Config,
) -> None:
    """Multiplies the query with a run of a row's directions, those of a cluster side by side."""
    _, kv_heads, group, _ = query_ref.shape
    room, clusters = directions_ref.shape[3], offsets_ref.shape[3] - 1
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    g, dim, in_dim, query = _load_query(query_ref, b, h)
    dtype = _product_dtype(query.dtype, directions_ref.dtype)
    end = plt.load(offsets_ref.at[layer, b, h, jnp.int32(clusters)])

    def visit(i: Any, carry: None) -> None:
        n = (part * config.blocks + i) * config.block + jnp.arange(config.block)
        exists = n < room
        cluster = lax.div(n, jnp.int32(room // clusters))
        begins = plt.load(offsets_ref.at[layer, b, h, cluster], mask=exists, other=0)
        # Nothing is read of clusters past the last one in use.
        in_use = exists & (begins < end)
        directions = plt.load(
            directions_ref.at[layer, b, h, n[:, None], dim[None, :]],
            mask=in_use[:, None] & in_dim[None, :],
            other=0,
        )
        products = scale * launch.dot(query.astype(dtype), directions.astype(dtype), (1, 1))
        plt.store(
            products_ref.at[b, h, g, n[None, :]], products, mask=(g < group) & exists[None, :]
        )

    lax.fori_loop(0, config.blocks, visit, None)


def _product_dtype(query: Any, directions: Any) -> Any:
    """Choose a dtype that holds both: int8 levels are whole numbers that every float holds."""
    return query if directions == jnp.int8 else jnp.promote_types(query, directions)


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
        widest = _product_dtype(centroids.dtype, directions.dtype)
        more = {"rank": rank, "directions": directions.dtype.name}
        directions = directions.reshape(*directions.shape[:3], clusters * rank, head_dim)
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
    heads = (batch, kv_heads, group)
    # As `score_tokens` multiplies codes: with float32 scales it takes the query as it is.
    floats = dtype == "float32" or query.dtype == jnp.float32
    packs = rotated and not floats and plt.takes_assembly()
    logits, partial, packed, products = launch.call(
        functools.partial(_kernel, scale=scale, config=config),
        (
            *(query.astype(centroids.dtype), centroids, offsets, launch.scalar(layer)),
            jnp.asarray(rotations(head_dim)) if packs else None,
            directions,
        ),
        (
            jax.ShapeDtypeStruct((*heads, clusters), jnp.float32),
            jax.ShapeDtypeStruct((*heads, parts), jnp.float32),
            packed_shapes(*query.shape) if packs else None,
            jax.ShapeDtypeStruct((*heads, clusters * rank), jnp.float32) if rank else None,
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
    return ClusterScores(logits, logsumexp, turned, products)
