"""Finding the candidates' tokens inside a kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels import backend as plt
from pallas_kernels.toolbox import launch, warp
from pallas_kernels.types import GRANULE


class Members(NamedTuple):
    """The refs that say whose members the candidates are: `Candidates`' fields, and the index's.

    Attributes:
        clusters, starts, granules: `[batch, kv_heads, ...]` int32, see `Candidates`.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32.
    """

    clusters: Any
    starts: Any
    granules: Any
    offsets: Any


def find_members(
    members: Members,
    at: tuple[Any, Any, Any],
    place: Any,
    valid: Any,
) -> tuple[Any, Any, Any]:
    """Find the clusters and index positions of places in a row's list of candidates.

    Args:
        members: the candidates.
        at: layer, sequence and kv head.
        place: `[n]` int32.
        valid: `[n]` bool, the places that are in the list.

    Returns:
        number, cluster, position: `[n]` int32, the place in `clusters`, what stands there, and the
            index position; of no meaning where not valid.
    """
    (clusters_ref, starts_ref, granules_ref, offsets_ref), (layer, b, h) = members, at
    granule = lax.shift_right_logical(place, jnp.full_like(place, GRANULE.bit_length() - 1))
    first = plt.load(granules_ref.at[b, h, granule], mask=valid, other=0)
    following = valid & (granule + 1 < granules_ref.shape[-1])
    # Every cluster has a member, so a granule's last one is not further from its first.
    last = plt.load(granules_ref.at[b, h, granule + 1], mask=following, other=2**30)
    last = jnp.minimum(jnp.minimum(last, first + (GRANULE - 1)), clusters_ref.shape[-1] - 1)

    def halve(_: Any, bounds: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        first, last, begins = bounds
        middle = (first + last + 1) >> 1
        # Past the last cluster starts hold the list's length, which no place reaches.
        start = plt.load(starts_ref.at[b, h, middle], mask=valid, other=0)
        right = start <= place
        first, last = jnp.where(right, middle, first), jnp.where(right, last, middle - 1)
        return first, last, jnp.where(right, start, begins)

    begins = plt.load(starts_ref.at[b, h, first], mask=valid, other=0)
    bounds = (first, last, begins)
    number, _, begins = lax.fori_loop(0, GRANULE.bit_length() - 1, halve, bounds)
    cluster = plt.load(clusters_ref.at[b, h, number], mask=valid, other=0)
    member = place - begins
    begins = plt.load(offsets_ref.at[layer, b, h, cluster], mask=valid, other=0)
    return number, cluster, begins + member


def find_members_of_granules(
    members: Members,
    at: tuple[Any, Any, Any],
    places: list[Any],
) -> list[tuple[Any, Any]]:
    """Find what `find_members` finds, without a search, where each warp holds a granule.

    Each thread reads of one of the clusters after the granule's first where it begins. All of them
    together mark these places in a word: the clusters up to a place are as many as the bits up to
    it, and what is known of the last one comes from the thread that read it. So what is read
    depends on fewer reads before it than in a search.

    Args:
        members, at: as there.
        places: `[threads]` int32 each, rising by one from a multiple of `GRANULE`. Triton gives
            thread i element i. What is read of one does not wait for what is read of another.

    Returns:
        for each, cluster and position: `[threads]` int32; past the list's end any number that is
        not negative.
    """
    (clusters_ref, starts_ref, granules_ref, offsets_ref), (layer, b, h) = members, at
    clusters = clusters_ref.shape[-1]

    def first_of(place: Any) -> Any:
        granule = lax.shift_right_logical(place, jnp.full_like(place, GRANULE.bit_length() - 1))
        granule = jnp.minimum(granule, granules_ref.shape[-1] - 1)
        return plt.load(granules_ref.at[b, h, granule])

    lane = places[0] & (GRANULE - 1)
    numbers = [jnp.minimum(first + lane, clusters - 1) for first in map(first_of, places)]
    starts = [plt.load(starts_ref.at[b, h, n]) for n in numbers]
    # Past the last one there is none.
    read = [jnp.minimum(plt.load(clusters_ref.at[b, h, n]), clusters - 1) for n in numbers]
    offsets = [plt.load(offsets_ref.at[layer, b, h, cluster]) for cluster in read]
    found = []
    for place, begins, cluster, offset in zip(places, starts, read, offsets, strict=True):
        source = launch.assembly(
            # A distance that is negative shifts the bit out, as a large one does. The first cluster
            # may begin at the granule's first place, and does not count.
            """{
            .reg .b32 bits, upto;
            shl.b32 bits, 1, $1;
            redux.sync.or.b32 bits, bits, 0xffffffff;
            mov.u32 upto, %lanemask_le;
            and.b32 bits, bits, upto;
            and.b32 bits, bits, 0xfffffffe;
            popc.b32 $0, bits;
            }""",
            begins - (place - lane),
            dtype=jnp.int32,
        )
        own, shift = (warp.from_lane(x, source) for x in (cluster, offset - begins))
        found.append((own, place + shift))
    return found
