"""`build_moments` as one Triton kernel: a program finds the directions of one cluster.

It reads its members again in each pass, which stay in the multiprocessor's cache: at most 64 of
them by default. What is left to XLA is small: to turn the directions within their span.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.build_moments.reference import ITERATIONS, OWN_SHARE, TINY, spoil, turn
from pallas_kernels.encode_tokens.reference import rotation
from pallas_kernels.toolbox import launch
from pallas_kernels.types import Clusters, Moments

MOST_RANK = 4
TURNED_AT_ONCE = 16_384  # clusters


@dataclasses.dataclass(frozen=True)
class Config:
    """Members that a program reads at a time, and its warps."""

    members: int = 32
    num_warps: int = 4


def build_moments(
    keys: Array,
    values: Array,
    clusters: Clusters,
    *,
    rank: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Moments:
    """See `pallas_kernels.build_moments`."""
    *lead, _, head_dim = keys.shape
    launch.check_heads("build_moments", 1, head_dim, keys.dtype, values.dtype)
    if rank > MOST_RANK:
        raise NotImplementedError(
            f"build_moments: rank is {rank}; the kernel knows 1 to {MOST_RANK}"
        )
    rows, num_clusters = math.prod(lead), clusters.centroids.shape[-2]
    if config is None:
        config = tuning.config(
            "build_moments",
            Config(members=16) if head_dim > 128 else Config(),
            clusters=num_clusters,
            head_dim=head_dim,
            rank=rank,
            dtype=keys.dtype.name,
        )
    flat = (x.reshape(rows, *x.shape[len(lead) :]) for x in (keys, values, *clusters))
    width = launch.tile(head_dim)
    vectors = jax.ShapeDtypeStruct((rows, num_clusters, rank, head_dim), jnp.float32)
    start = jnp.pad(rotation(head_dim)[:, :rank].T, ((0, 0), (0, width - head_dim)))
    directions, weights, within = launch.call(
        functools.partial(_kernel, rank=rank, shape=(config.members, width), head_dim=head_dim),
        (*flat, jnp.asarray(start, jnp.float32)),
        (vectors, vectors, jax.ShapeDtypeStruct((rows, num_clusters, rank * rank), jnp.float32)),
        (num_clusters, rows),
        name="build_moments",
        num_warps=config.num_warps,
        interpret=interpret,
    )
    shaped = tuple(x.reshape(rows, num_clusters, rank, -1) for x in (directions, weights, within))
    # By parts: the eigenvectors' workspace grows with the matrices that are given at once.
    at_once = max(TURNED_AT_ONCE // num_clusters, 1)
    found = lax.map(lambda x: turn(*x), shaped, batch_size=at_once)
    spoilt = ~jnp.all(
        jnp.isfinite(clusters.centroids) & jnp.isfinite(clusters.value_means), axis=-1
    )
    return spoil(jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found), spoilt)


def _kernel(
    keys_ref: Any,
    values_ref: Any,
    centroids_ref: Any,
    value_means_ref: Any,
    offsets_ref: Any,
    order_ref: Any,
    start_ref: Any,
    directions_ref: Any,
    weights_ref: Any,
    within_ref: Any,
    *,
    rank: int,
    shape: tuple[int, int],
    head_dim: int,
) -> None:
    """Find one cluster's directions, what its values vary along them, and their covariance.

    Of a cluster that is not finite the results are zeros.
    """
    members, width = shape
    cluster, row = pl.program_id(0), pl.program_id(1)
    dims = jnp.arange(width)
    inside = dims < head_dim
    begin = plt.load(offsets_ref.at[row, cluster])
    size = plt.load(offsets_ref.at[row, cluster + 1]) - begin
    means = [
        plt.load(ref.at[row, cluster, dims], mask=inside, other=0.0)
        for ref in (centroids_ref, value_means_ref)
    ]
    # What is not finite is not zero, less itself.
    spoilt = jnp.max(jnp.where(sum(x - x for x in means) == 0, 0, 1), axis=0)
    size = jnp.where(spoilt == 0, size, 0)
    count = jnp.maximum(size, 1).astype(jnp.float32)

    def residuals(i: Any) -> list[Any]:
        nth = i * members + jnp.arange(members)
        member = nth < size
        token = plt.load(order_ref.at[row, begin + nth], mask=member, other=0)
        mask = member[:, None] & inside[None, :]
        return [
            jnp.where(
                mask,
                plt.load(ref.at[row, token[:, None], dims[None, :]], mask=mask, other=0.0).astype(
                    jnp.float32
                )
                - mean[None, :],
                0.0,
            )
            for ref, mean in zip((keys_ref, values_ref), means, strict=True)
        ]

    def over_members(part: Any, zeros: tuple[Any, ...]) -> tuple[Any, ...]:
        """Average what `part` makes of a block's residuals."""

        def add(i: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(x + y for x, y in zip(totals, part(*residuals(i)), strict=True))

        totals = lax.fori_loop(0, pl.cdiv(size, members), add, zeros)
        return tuple(x / count for x in totals)

    zero, vectors = jnp.float32(0), (jnp.zeros((width,), jnp.float32),) * rank
    [variance] = over_members(lambda _, e: (jnp.sum(jnp.sum(e * e, axis=1), axis=0),), (zero,))
    share = jnp.where(variance > 0, OWN_SHARE * variance, 1.0)

    def iterate(_: Any, basis: tuple[Any, ...]) -> tuple[Any, ...]:
        def forth(d: Any, e: Any) -> tuple[Any, ...]:
            along = [_along(d, b) for b in basis]
            return (*(_across(e, x) for x in along), *(_across(d, x) for x in along))

        both = over_members(forth, vectors * 2)
        of_values, of_keys = both[:rank], both[rank:]
        back = over_members(
            lambda d, e: tuple(_across(d, _along(e, v)) for v in of_values), vectors
        )
        return _orthonormal([x + share * y for x, y in zip(back, of_keys, strict=True)])

    start = tuple(plt.load(start_ref.at[i, dims]) for i in range(rank))
    basis = lax.fori_loop(0, ITERATIONS, iterate, start)
    pairs = [(i, j) for i in range(rank) for j in range(i, rank)]

    def finish(d: Any, e: Any) -> tuple[Any, ...]:
        along = [_along(d, b) for b in basis]
        squares = (jnp.sum(along[i] * along[j], axis=0) for i, j in pairs)
        return (*(_across(e, x) for x in along), *squares)

    found = over_members(finish, vectors + (zero,) * len(pairs))
    for i in range(rank):
        plt.store(directions_ref.at[row, cluster, i, dims], basis[i], mask=inside)
        plt.store(weights_ref.at[row, cluster, i, dims], found[i], mask=inside)
    place = jnp.arange(launch.tile(rank * rank))
    squares = jnp.zeros(place.shape, jnp.float32)
    for (i, j), square in zip(pairs, found[rank:], strict=True):
        squares = jnp.where((place == i * rank + j) | (place == j * rank + i), square, squares)
    plt.store(within_ref.at[row, cluster, place], squares, mask=place < rank * rank)


def _along(x: Any, vector: Any) -> Any:
    """Multiply each member with a vector: `[members]`."""
    return jnp.sum(x * vector[None, :], axis=1)


def _across(x: Any, numbers: Any) -> Any:
    """Sum the members, each times its number: `[width]`."""
    return jnp.sum(x * numbers[:, None], axis=0)


def _unit(x: Any) -> tuple[Any, Any]:
    """Give a vector of length 1, or 0, and how long it was: as the reference does."""
    peak = jnp.maximum(jnp.max(jnp.abs(x), axis=0), TINY)
    scaled = x / peak
    length = jnp.sqrt(jnp.sum(scaled * scaled, axis=0))
    return scaled / jnp.maximum(length, TINY), peak * length


def _orthonormal(vectors: list[Any]) -> tuple[Any, ...]:
    """Make vectors orthonormal, as the reference does."""
    found: list[Any] = []
    for vector in vectors:
        vector, kept = _unit(vector)[0], True
        for least in (0, 0.5) if found else ():
            inside = [jnp.sum(x * vector, axis=0) for x in found]
            rest = vector - sum(x * y for x, y in zip(found, inside, strict=True))
            vector, length = _unit(rest)
            kept &= length > least
        found.append(vector if kept is True else jnp.where(kept, vector, 0.0))
    return tuple(found)
