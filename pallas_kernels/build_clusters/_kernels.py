"""The Triton kernels of `build_clusters`. Each program works on one row, its grid's last axis."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.build_clusters.reference import POWER_ITERATIONS
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, NO_ID


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)


def _one_hot(mask: Any, dtype: Any) -> Any:
    # Not a cast, which would go by way of float32.
    return jnp.where(mask, jnp.ones((), dtype), jnp.zeros((), dtype))


def assign_kernel(
    x_ref: Any,
    centroids_ref: Any,
    counts_ref: Any,
    used_ref: Any,
    out_ref: Any,
    *,
    shape: tuple[int, int, int],
    max_clusters: int,
) -> None:
    """Find the best centroid of each of a block's tokens, ties to the lower id."""
    block, clusters, width = shape
    row, begin = pl.program_id(1), pl.program_id(0) * block
    count, used = plt.load(counts_ref.at[row]), plt.load(used_ref.at[row])
    dims = jnp.arange(width)
    x = plt.load(x_ref.at[row, pl.ds(begin, block), pl.ds(0, width)])

    def compare(i: Any, carry: Any) -> Any:
        best, winner = carry
        cluster = i * clusters + jnp.arange(clusters)
        # Past the last centroid in use that one is repeated, and then loses the tie to itself.
        place = jnp.minimum(cluster, used - 1)
        centroids = plt.load(centroids_ref.at[row, place[:, None], dims[None, :]])
        scores = _dot(x, centroids.T)
        top = jnp.max(scores, axis=1)
        first = jnp.min(jnp.where(scores == top[:, None], cluster[None, :], NO_ID), axis=1)
        return jnp.maximum(best, top), jnp.where(top > best, first, winner)

    carry = jnp.full((block,), MASKED), jnp.zeros((block,), jnp.int32)
    steps = jnp.where(begin < count, pl.cdiv(used, clusters), 0)
    _, winner = lax.fori_loop(0, steps, compare, carry)
    valid = begin + jnp.arange(block) < count
    plt.store(out_ref.at[row, pl.ds(begin, block)], jnp.where(valid, winner, max_clusters))


def move_kernel(
    x_ref: Any,
    assignment_ref: Any,
    old_ref: Any,
    counts_ref: Any,
    used_ref: Any,
    out_ref: Any,
    *,
    shape: tuple[int, int, int],
) -> None:
    """Move centroids to their members' direction; those without members stay.

    A product with a one-hot matrix, made on the fly: sums in a fixed order, on the tensor cores.
    """
    clusters, block, width = shape
    row, begin = pl.program_id(1), pl.program_id(0) * clusters
    cluster = begin + jnp.arange(clusters)
    at = (row, pl.ds(begin, clusters), pl.ds(0, width))

    def add(i: Any, sums: Any) -> Any:
        assignment = plt.load(assignment_ref.at[row, pl.ds(i * block, block)])
        x = plt.load(x_ref.at[row, pl.ds(i * block, block), pl.ds(0, width)])
        return sums + _dot(_one_hot(cluster[:, None] == assignment[None, :], x.dtype), x)

    sums = jnp.zeros((clusters, width), jnp.float32)
    steps = pl.cdiv(plt.load(counts_ref.at[row]), block)
    # Of centroids that are not in use nothing moves.
    steps = jnp.where(begin < plt.load(used_ref.at[row]), steps, 0)
    sums = lax.fori_loop(0, steps, add, sums)
    norm = jnp.sqrt(jnp.sum(sums * sums, axis=1, keepdims=True))
    old = plt.load(old_ref.at[at])
    moved = (sums * (1 / jnp.maximum(norm, 1e-30))).astype(old.dtype)
    plt.store(out_ref.at[at], jnp.where(norm > 0, moved, old))


def cut_kernel(
    x_ref: Any,
    members_ref: Any,
    first_ref: Any,
    start_ref: Any,
    most_ref: Any,
    _: Any,
    order_ref: Any,
    along_ref: Any,
    piece_ref: Any,
    *,
    shape: tuple[int, int],
    interpret: bool,
) -> None:
    """Cuts one cluster if it is too large. `along_ref` and `piece_ref` are scratch."""
    tile, width = shape
    cluster, row = pl.program_id(0), pl.program_id(1)
    first = plt.load(first_ref.at[row, cluster])
    size = plt.load(first_ref.at[row, cluster + 1]) - first
    pieces = pl.cdiv(size, plt.load(most_ref.at[row]))
    steps = jnp.where(pieces > 1, pl.cdiv(size, tile), 0)
    lane, dims = jnp.arange(tile), jnp.arange(width)

    def token(i: Any) -> Any:
        return plt.load(
            members_ref.at[row, first + i * tile + lane], mask=i * tile + lane < size, other=0
        )

    def load(i: Any) -> Any:
        # Members past the last stand for token 0, whose key must not count.
        mask = (i * tile + lane < size)[:, None]
        return plt.load(
            x_ref.at[row, token(i)[:, None], dims[None, :]], mask=mask, other=0.0
        ).astype(jnp.float32)

    def sum_over(term: Any) -> Any:
        total = lax.fori_loop(
            0, steps, lambda i, t: t + term(i), jnp.zeros((tile, width), jnp.float32)
        )
        return jnp.sum(total, axis=0, keepdims=True)

    mean = sum_over(load) / jnp.maximum(size, 1).astype(jnp.float32)

    def deviation(i: Any) -> Any:
        return jnp.where((i * tile + lane < size)[:, None], load(i) - mean, 0.0)

    def power_iteration(_: Any, direction: Any) -> Any:
        def term(i: Any) -> Any:
            x = deviation(i)
            return x * jnp.sum(x * direction, axis=1, keepdims=True)

        direction = sum_over(term)
        norm = jnp.sqrt(jnp.sum(direction * direction))
        return direction * (1 / jnp.maximum(norm, 1e-30))

    start = plt.load(start_ref.at[pl.ds(0, width)])[None, :]
    rounds = POWER_ITERATIONS * jnp.minimum(steps, 1)
    direction = lax.fori_loop(0, rounds, power_iteration, start)

    def place(i: Any) -> Any:
        return (row, first + i * tile + lane)

    def inside(i: Any) -> Any:
        return i * tile + lane < size

    def project(i: Any, _: Any) -> Any:
        along = jnp.sum(deviation(i) * direction, axis=1)
        # NaN, of products too large for float32, would have no place among the others.
        along = jnp.where(along == along, along, 0.0)
        plt.store(along_ref.at[place(i)], along, mask=inside(i))
        return _

    def count_members(ref: Any, i: Any, before: Any) -> Any:
        # Of each of tile i's members, how many of the cluster come before it. By comparing all
        # pairs: a cluster has few members, and a sort would go through all clusters.
        own = plt.load(ref.at[place(i)], mask=inside(i), other=0)[:, None]

        def add(j: Any, total: Any) -> Any:
            other = plt.load(ref.at[place(j)], mask=inside(j), other=0)[None, :]
            earlier = (j * tile + lane)[None, :] < (i * tile + lane)[:, None]
            counted = before(own, other, earlier) & inside(j)[None, :]
            return total + jnp.sum(counted.astype(jnp.int32), axis=1)

        return lax.fori_loop(0, steps, add, jnp.zeros((tile,), jnp.int32))

    def assign_piece(i: Any, _: Any) -> Any:
        rank = count_members(
            along_ref, i, lambda own, other, earlier: (other < own) | ((other == own) & earlier)
        )
        piece = lax.div(rank * pieces, jnp.maximum(size, 1))
        plt.store(piece_ref.at[place(i)], piece, mask=inside(i))
        return _

    def write(i: Any, _: Any) -> Any:
        piece = plt.load(piece_ref.at[place(i)], mask=inside(i), other=0)
        earlier = count_members(piece_ref, i, lambda own, other, earlier: (other == own) & earlier)
        begin = pl.cdiv(piece * size, jnp.maximum(pieces, 1))
        # Lanes past the last member write nothing, to places of their own.
        to = jnp.where(inside(i), begin + earlier, i * tile + lane)
        plt.store(order_ref.at[row, first + to], token(i), mask=inside(i))
        return _

    for phase in (project, assign_piece, write):
        lax.fori_loop(0, steps, phase, 0)
        launch.barrier(interpret)


def average_kernel(
    keys_ref: Any,
    values_ref: Any,
    spoilt_ref: Any,
    order_ref: Any,
    offsets_ref: Any,
    centroids_ref: Any,
    value_means_ref: Any,
    *,
    shape: tuple[int, int, int],
    head_dim: int,
) -> None:
    """Averages the members of a few pieces, which are neighbours in `order`.

    `spoilt_ref`: int32, bit 0 of a token whose key is not finite, bit 1 of such a value.
    """
    clusters, block, width = shape
    row, begin = pl.program_id(1), pl.program_id(0) * clusters
    last = offsets_ref.shape[1] - 1
    cluster = begin + jnp.arange(clusters)
    low = plt.load(offsets_ref.at[row, jnp.minimum(cluster, last)])
    high = plt.load(offsets_ref.at[row, jnp.minimum(cluster + 1, last)])
    start = plt.load(offsets_ref.at[row, begin])
    end = plt.load(offsets_ref.at[row, jnp.minimum(begin + clusters, last)])
    dims = jnp.arange(width)

    def add(i: Any, sums: Any) -> Any:
        at = start + i * block + jnp.arange(block)
        token = plt.load(order_ref.at[row, jnp.minimum(at, end - 1)])
        spoilt = plt.load(spoilt_ref.at[row, token])
        mask = (at < end)[:, None] & (dims < head_dim)[None, :]
        member = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])

        def total(ref: Any, bit: int) -> Any:
            # In a product NaN would reach all pieces of the program.
            sound = mask & ((spoilt >> bit) & 1 == 0)[:, None]
            x = plt.load(ref.at[row, token[:, None], dims[None, :]], mask=sound, other=0.0)
            return _dot(_one_hot(member, x.dtype), x)

        seen = sums[2]
        for bit in (1, 2):
            seen |= jnp.max(jnp.where(member, (spoilt & bit)[None, :], 0), axis=1)
        return sums[0] + total(keys_ref, 0), sums[1] + total(values_ref, 1), seen

    zero = jnp.zeros((clusters, width), jnp.float32)
    start_of_all = zero, zero, jnp.zeros((clusters,), jnp.int32)
    *sums, seen = lax.fori_loop(0, pl.cdiv(end - start, block), add, start_of_all)
    members = jnp.maximum(high - low, 1).astype(jnp.float32)
    for bit, (ref, x) in enumerate(zip((centroids_ref, value_means_ref), sums, strict=True)):
        mean = jnp.where((seen >> bit & 1 == 1)[:, None], jnp.nan, x / members[:, None])
        plt.store(ref.at[row, pl.ds(begin, clusters), pl.ds(0, width)], mean)
