"""`build_clusters` as Triton kernels, with XLA for one sort and for what is small.

Five stages, each for all rows at once: centre the keys; k-means, whose scores are never written;
sort the tokens by cluster; cut the large clusters; sum the pieces' members. No stage adds floats
in an order that could change, so the same input gives the same bits.

Keys of 16 bits are centred and clustered in bfloat16, on the tensor cores: a token between two
centroids may go to the other one than in the reference. Final sums are of the keys as given.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.build_clusters import _kernels
from pallas_kernels.build_clusters.reference import capacity, check_sizes
from pallas_kernels.toolbox import launch
from pallas_kernels.types import Clusters


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles, warps and stages of the kernels.

    Attributes:
        assign_clusters, assign_tokens: tile of scores.
        move_clusters, move_tokens: clusters a program moves, and tokens it reads at a time.
        cut_tokens: tokens of a large cluster read at a time.
        sum_clusters, sum_tokens: clusters a program sums at the end, and tokens it reads at a time.
    """

    assign_clusters: int = 128
    assign_tokens: int = 128
    assign_warps: int = 8
    assign_stages: int = 2
    move_clusters: int = 128
    move_tokens: int = 32
    move_warps: int = 8
    move_stages: int = 4
    cut_tokens: int = 64
    cut_warps: int = 4
    sum_clusters: int = 16
    sum_tokens: int = 64
    sum_warps: int = 4


def heuristic(rows: int, clusters: int, head_dim: int, dtype: DTypeLike) -> Config:
    """Choose tiles that fit in registers and, for few rows, more and smaller programs."""
    if dtype == jnp.float32:
        # Exact products of float32 are not the tensor cores' work, and take more registers.
        return Config(
            assign_clusters=32,
            assign_tokens=64,
            move_clusters=32,
            move_tokens=32,
            move_stages=2,
            sum_tokens=32,
        )
    wide = head_dim > 128
    move_clusters = 64 if wide else 128
    while move_clusters > launch.DOT_TILE and rows * -(-clusters // move_clusters) < 128:
        move_clusters //= 2
    small = move_clusters <= 32
    return Config(
        assign_clusters=64 if wide else 128,
        move_clusters=move_clusters,
        move_tokens=128 if small else 32,
        move_warps=4 if small else 8,
        move_stages=3 if small else 4,
        cut_tokens=32 if wide else 64,
    )


def build_clusters(
    keys: Array,
    values: Array,
    count: Array | int,
    *,
    cluster_size: Array | int,
    max_cluster_size: Array | int,
    iterations: int,
    least_sizes: tuple[int, int] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Clusters:
    """See `pallas_kernels.build_clusters`."""
    *lead, tokens, head_dim = keys.shape
    launch.check_heads("build_clusters", 1, head_dim, keys.dtype, values.dtype)
    least_sizes = check_sizes(cluster_size, max_cluster_size, least_sizes)
    max_clusters = -(-tokens // least_sizes[0])
    if (max_clusters + 1) * tokens > 2**32:
        raise NotImplementedError(
            f"build_clusters: {max_clusters} clusters of {tokens} tokens; the kernels sort by a "
            "key of 32 bits"
        )
    keys, values = (x.reshape(-1, tokens, head_dim) for x in (keys, values))
    counts, sizes, most = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), lead).reshape(-1)
        for x in (count, cluster_size, max_cluster_size)
    )
    if config is None:
        config = tuning.config(
            "build_clusters",
            heuristic(keys.shape[0], max_clusters, head_dim, keys.dtype),
            rows=keys.shape[0],
            tokens=tokens,
            clusters=max_clusters,
            head_dim=head_dim,
            dtype=keys.dtype.name,
        )
    run = functools.partial(launch.call, interpret=interpret)

    x = centre(keys, counts, max(config.assign_tokens, config.move_tokens))
    assignment = k_means(run, config, x, counts, max_clusters, sizes, iterations)
    members, first = sort_by_cluster(assignment[:, :tokens], max_clusters)
    order = cut(run, config, x, members, first, most, interpret)
    num_pieces = capacity(tokens, *least_sizes)
    offsets = piece_offsets(first, num_pieces, most)
    means = average_pieces(run, config, keys, values, order, offsets)
    return Clusters(*(y.reshape(*lead, *y.shape[1:]) for y in (*means, offsets, order)))


def centre(keys: Array, counts: Array, multiple: int) -> Array:
    """Keys less their mean: `[rows, tokens, head_dim]`, both padded with zeros to whole tiles.

    Zeros also for keys that are not finite, which have no part in the mean.
    """
    _, tokens, head_dim = keys.shape
    # Padding may hold anything, NaN included.
    sound = (jnp.arange(tokens) < counts[:, None]) & jnp.all(jnp.isfinite(keys), axis=-1)
    number = jnp.maximum(jnp.sum(sound, axis=1), 1)
    sound = sound[..., None]
    total = jnp.sum(jnp.where(sound, keys.astype(jnp.float32), 0), axis=1, keepdims=True)
    mean = total / number[:, None, None]
    dtype = jnp.float32 if keys.dtype == jnp.float32 else jnp.bfloat16
    x = jnp.where(sound, keys.astype(jnp.float32) - mean, 0).astype(dtype)
    return jnp.pad(x, ((0, 0), (0, -tokens % multiple), (0, launch.tile(head_dim) - head_dim)))


def k_means(
    run: Any,
    config: Config,
    x: Array,
    counts: Array,
    max_clusters: int,
    sizes: Array,
    iterations: int,
) -> Array:
    """Assign each centred key to a cluster: `[rows, tokens]` int32, `max_clusters` for padding."""
    rows, tokens, width = x.shape
    clusters = max_clusters + -max_clusters % config.move_clusters
    used = -(-counts // sizes)
    # In int32, as in the reference.
    midpoint = (
        (2 * jnp.arange(clusters) + 1) * counts[:, None] // (2 * jnp.maximum(used, 1)[:, None])
    )
    midpoint = jnp.minimum(midpoint, jnp.maximum(counts, 1)[:, None] - 1)
    start = jnp.take_along_axis(x, midpoint[..., None], axis=1).astype(jnp.float32)
    norm = jnp.linalg.norm(start, axis=-1, keepdims=True)
    start = (start / jnp.maximum(norm, 1e-30)).astype(x.dtype)

    def assign(centroids: Array) -> Array:
        return run(
            functools.partial(
                _kernels.assign_kernel,
                shape=(config.assign_tokens, config.assign_clusters, width),
                max_clusters=max_clusters,
            ),
            (x, centroids, counts, used),
            jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
            (tokens // config.assign_tokens, rows),
            name="assign_tokens",
            num_warps=config.assign_warps,
            num_stages=config.assign_stages,
        )

    def iterate(_: Array, centroids: Array) -> Array:
        return run(
            functools.partial(
                _kernels.move_kernel, shape=(config.move_clusters, config.move_tokens, width)
            ),
            (x, assign(centroids), centroids, counts, used),
            jax.ShapeDtypeStruct(centroids.shape, centroids.dtype),
            (clusters // config.move_clusters, rows),
            name="move_centroids",
            num_warps=config.move_warps,
            num_stages=config.move_stages,
        )

    return assign(lax.fori_loop(0, iterations, iterate, start))


def sort_by_cluster(assignment: Array, max_clusters: int) -> tuple[Array, Array]:
    """Sort the tokens by cluster and then by number.

    Returns:
        the tokens in that order, `[rows, tokens]` int32, and each cluster's first place in it,
        `[rows, max_clusters + 1]` int32.
    """
    tokens = assignment.shape[1]
    # One key of 32 bits for both: the sort that XLA does fastest on a GPU.
    token = jnp.arange(tokens, dtype=jnp.uint32)
    key = lax.sort(assignment.astype(jnp.uint32) * jnp.uint32(tokens) + token)
    edges = jnp.arange(max_clusters + 1, dtype=jnp.uint32) * jnp.uint32(tokens)
    # Unrolled: a loop's rounds cost more than the search.
    first = jax.vmap(lambda k: jnp.searchsorted(k, edges, method="scan_unrolled"))(key)
    return (key % jnp.uint32(tokens)).astype(jnp.int32), first.astype(jnp.int32)


def cut(
    run: Any,
    config: Config,
    x: Array,
    members: Array,
    first: Array,
    most: Array,
    interpret: bool,
) -> Array:
    """Reorders each cluster above the size limit by even pieces along its main direction."""
    rows, tokens = members.shape
    clusters = first.shape[1] - 1
    # Room for a whole tile that begins at the last token.
    room = tokens + config.cut_tokens
    members = jnp.pad(members, ((0, 0), (0, config.cut_tokens)))
    # Any start that is not orthogonal to the main direction will do: as the reference's.
    start = jnp.cos(jnp.arange(x.shape[-1], dtype=jnp.float32) ** 2)
    order, _, _ = run(
        functools.partial(
            _kernels.cut_kernel,
            shape=(config.cut_tokens, x.shape[-1]),
            interpret=interpret,
        ),
        (x, members, first, start, most, members),
        (
            jax.ShapeDtypeStruct((rows, room), jnp.int32),
            jax.ShapeDtypeStruct((rows, room), jnp.float32),
            jax.ShapeDtypeStruct((rows, room), jnp.int32),
        ),
        (clusters, rows),
        name="cut_clusters",
        num_warps=config.cut_warps,
        aliases={5: 0},
    )
    return order[:, :tokens]


def piece_offsets(first: Array, num_pieces: int, most: Array) -> Array:
    """Where each piece begins: `[rows, num_pieces + 1]` int32."""

    def of_row(first: Array, most: Array) -> Array:
        sizes = jnp.diff(first)
        pieces = -(-sizes // most)
        ends = jnp.cumsum(pieces)
        piece = jnp.arange(num_pieces + 1)
        cluster = jnp.searchsorted(ends, piece, side="right", method="scan_unrolled")
        own = jnp.minimum(cluster, sizes.shape[0] - 1)
        nth = jnp.minimum(piece - (ends - pieces)[own], pieces[own])
        begin = first[own] - (-nth * sizes[own]) // jnp.maximum(pieces[own], 1)
        return jnp.where(cluster < sizes.shape[0], begin, first[-1]).astype(jnp.int32)

    return jax.vmap(of_row)(first, most)


def average_pieces(
    run: Any, config: Config, keys: Array, values: Array, order: Array, offsets: Array
) -> tuple[Array, Array]:
    """Means of each piece's keys and values: `[rows, num_pieces, head_dim]` float32 each."""
    rows, _, head_dim = keys.shape
    num_pieces = offsets.shape[1] - 1
    tile, width = config.sum_clusters, launch.tile(head_dim)
    steps = pl.cdiv(num_pieces, tile)
    out = jax.ShapeDtypeStruct((rows, steps * tile, width), jnp.float32)
    # Told to the kernel, which would have to look at each tile's tokens one by one.
    spoilt = sum(
        (~jnp.all(jnp.isfinite(x), axis=-1)).astype(jnp.int32) << bit
        for bit, x in enumerate((keys, values))
    )
    means = run(
        functools.partial(
            _kernels.average_kernel, shape=(tile, config.sum_tokens, width), head_dim=head_dim
        ),
        (keys, values, spoilt, order, offsets),
        (out, out),
        (steps, rows),
        name="average_pieces",
        num_warps=config.sum_warps,
    )
    return tuple(x[:, :num_pieces, :head_dim] for x in means)
