"""The semantics of `build_clusters`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.types import Clusters

POWER_ITERATIONS = 4


def capacity(tokens: int, cluster_size: int, max_cluster_size: int) -> int:
    """Count the most clusters a segment of so many tokens can have.

    k clusters of n_j tokens are cut into sum(ceil(n_j / max)) <= k + n / max pieces.
    """
    return min(-(-tokens // cluster_size) + tokens // max_cluster_size, tokens)


def check_sizes(
    cluster_size: Array | int, max_cluster_size: Array | int, least_sizes: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the least of both sizes, which make the room for clusters; see `build_clusters`.

    Raises:
        ValueError: the sizes are arrays, and `least_sizes` is not given.
    """
    if least_sizes is not None:
        return least_sizes
    if isinstance(cluster_size, int) and isinstance(max_cluster_size, int):
        return cluster_size, max_cluster_size
    raise ValueError(
        "build_clusters: cluster_size or max_cluster_size is an array; give least_sizes, which "
        "make the room for clusters"
    )


def _sum_members(assignment: Array, x: Array, num_clusters: int) -> Array:
    # A product with a one-hot matrix, not a scatter: float atomics would make sums depend on the
    # order in which a GPU happens to run.
    one_hot = (assignment[None, :] == jnp.arange(num_clusters)[:, None]).astype(jnp.float32)
    return jnp.matmul(one_hot, x, precision=lax.Precision.HIGHEST)


def _spherical_k_means(
    x: Array, count: Array | int, num_clusters: Array | int, max_clusters: int, iterations: int
) -> Array:
    """Assign each centred key to a cluster (RetroInfer, section 4.3)."""
    tokens = x.shape[0]
    cluster = jnp.arange(max_clusters)
    # In int32, since `num_clusters` times `tokens` stays far below 2^31 for any segment.
    midpoint = (2 * cluster + 1) * count // (2 * jnp.maximum(num_clusters, 1))
    centroids = x[jnp.minimum(midpoint, tokens - 1)]
    in_use = cluster < num_clusters
    valid = jnp.arange(tokens) < count

    def assign(centroids: Array) -> Array:
        scores = x @ centroids.T
        # NaN, of products too large for float32, must not leave a token without a cluster.
        scores = jnp.where(in_use & (scores == scores), scores, -jnp.inf)
        # As argmax, which XLA does not vectorise on a CPU.
        best = jnp.max(scores, axis=1, keepdims=True)
        first = jnp.min(jnp.where(scores == best, cluster, max_clusters), axis=1)
        return jnp.where(valid, first, max_clusters)

    def normalise(sums: Array, old: Array) -> Array:
        norm = jnp.linalg.norm(sums, axis=-1, keepdims=True)
        return jnp.where(norm > 0, sums / jnp.maximum(norm, 1e-30), old)

    def iterate(_: Array, centroids: Array) -> Array:
        return normalise(_sum_members(assign(centroids), x, max_clusters), centroids)

    return assign(lax.fori_loop(0, iterations, iterate, normalise(centroids, centroids)))


def _cut(x: Array, assignment: Array, max_clusters: int, max_cluster_size: Array | int) -> Array:
    """Cuts clusters above the size limit into even pieces along their main direction."""
    tokens = x.shape[0]
    padding = assignment == max_clusters
    safe = jnp.minimum(assignment, max_clusters - 1)
    sizes = jnp.zeros(max_clusters + 1, jnp.int32).at[assignment].add(1)[:max_clusters]
    sums = _sum_members(assignment, x, max_clusters)
    deviation = x - (sums / jnp.maximum(sizes, 1)[:, None])[safe]

    def power_iteration(_: Array, direction: Array) -> Array:
        along = jnp.sum(deviation * direction[safe], axis=-1)
        direction = _sum_members(assignment, deviation * along[:, None], max_clusters)
        norm = jnp.linalg.norm(direction, axis=-1, keepdims=True)
        return direction / jnp.maximum(norm, 1e-30)

    # Any start that is not orthogonal to the main direction will do: a fixed vector of no
    # special direction.
    start = jnp.cos(jnp.arange(x.shape[-1], dtype=jnp.float32) ** 2)
    direction = lax.fori_loop(
        0, POWER_ITERATIONS, power_iteration, jnp.broadcast_to(start, (max_clusters, x.shape[-1]))
    )
    along = jnp.sum(deviation * direction[safe], axis=-1)
    along = jnp.where(padding | (along != along), 0.0, along)

    token = jnp.arange(tokens, dtype=jnp.int32)
    ordered, _, order = lax.sort((assignment, along, token), num_keys=3)
    first = jnp.cumsum(sizes) - sizes
    rank = (
        jnp.zeros(tokens, jnp.int32)
        .at[order]
        .set(token - first[jnp.minimum(ordered, max_clusters - 1)])
    )
    pieces = -(-sizes // max_cluster_size)
    first_piece = jnp.cumsum(pieces) - pieces
    piece = first_piece[safe] + rank * pieces[safe] // jnp.maximum(sizes[safe], 1)
    return jnp.where(padding, tokens, piece)


def build_clusters_of_row(
    keys: Array,
    values: Array,
    count: Array | int,
    *,
    cluster_size: Array | int,
    max_cluster_size: Array | int,
    least_sizes: tuple[int, int],
    iterations: int,
) -> Clusters:
    """See `pallas_kernels.build_clusters`; keys and values `[tokens, head_dim]`."""
    tokens = keys.shape[0]
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    valid = jnp.arange(tokens) < count
    # Padding may hold anything, NaN included.
    sound = valid & jnp.all(jnp.isfinite(keys), axis=-1)
    finite_keys = jnp.where(sound[:, None], keys, 0)
    mean = jnp.sum(finite_keys, axis=0) / jnp.maximum(jnp.sum(sound), 1)
    centred = jnp.where(sound[:, None], finite_keys - mean, 0)

    max_clusters = -(-tokens // least_sizes[0])
    num_clusters = -(-count // cluster_size)
    assignment = _spherical_k_means(centred, count, num_clusters, max_clusters, iterations)
    cluster = _cut(centred, assignment, max_clusters, max_cluster_size)

    order = jnp.argsort(cluster, stable=True).astype(jnp.int32)
    num_pieces = capacity(tokens, *least_sizes)
    offsets = jnp.searchsorted(cluster[order], jnp.arange(num_pieces + 1)).astype(jnp.int32)
    sizes = jnp.diff(offsets)[:, None]

    def mean_of(x: Array) -> Array:
        finite = valid & jnp.all(jnp.isfinite(x), axis=-1)
        sums = _sum_members(cluster, jnp.where(finite[:, None], x, 0), num_pieces)
        spoilt = jnp.zeros(num_pieces, bool).at[cluster].max(valid & ~finite, mode="drop")
        return jnp.where(spoilt[:, None], jnp.nan, sums / jnp.maximum(sizes, 1))

    return Clusters(mean_of(keys), mean_of(values), offsets, order)


def build_clusters(
    keys: Array,
    values: Array,
    count: Array | int,
    *,
    cluster_size: Array | int,
    max_cluster_size: Array | int,
    iterations: int,
    least_sizes: tuple[int, int] | None = None,
) -> Clusters:
    """See `pallas_kernels.build_clusters`."""
    least_sizes = check_sizes(cluster_size, max_cluster_size, least_sizes)
    numbers = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), keys.shape[:-2])
        for x in (count, cluster_size, max_cluster_size)
    )

    def of_row(
        keys: Array, values: Array, count: Array, cluster_size: Array, max_cluster_size: Array
    ) -> Clusters:
        return build_clusters_of_row(
            keys,
            values,
            count,
            cluster_size=cluster_size,
            max_cluster_size=max_cluster_size,
            least_sizes=least_sizes,
            iterations=iterations,
        )

    def of_rows(*operands: Array) -> Clusters:
        if operands[0].ndim == 2:
            return of_row(*operands)
        if operands[0].ndim == 3:
            return jax.vmap(of_row)(*operands)
        # One group of rows after another: all at once would take memory and save no time.
        return lax.map(lambda group: of_rows(*group), operands)

    return of_rows(keys, values, *numbers)
