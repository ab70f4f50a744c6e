"""Bytes of temporaries that moments take: as a prompt's are built, and in a step."""

from pallas_kernels.build_clusters import capacity
from pallas_kernels.build_moments.reference import BLOCK
from wavejax.config import WaveConfig


def building_bytes(
    config: WaveConfig, segment: int, segments: int, heads: int, dim: int
) -> tuple[int, int]:
    """Count the bytes of temporaries that build the moments of a call's segments.

    Args:
        config: the settings.
        segment: tokens in a segment.
        segments: in the call.
        heads: kv heads.
        dim: numbers in a key.

    Returns:
        what building them takes, after the clusters are there; and what all of them take.
    """
    rank = config.moment_rank
    if not rank:
        return 0, 0
    clusters = capacity(segment, *config.size_steps[-1][:2])
    # Of one head's segment: residuals; a block of every cluster's members, which are gathered and
    # cut; bases, products and their sums.
    one = 2 * segment * dim + clusters * (4 * BLOCK * dim + 10 * rank * dim)
    # Of all: the vectors as they come, and side by side with those of the index.
    return 4 * one, 4 * 4 * segments * heads * clusters * rank * dim


def step_bytes(config: WaveConfig, clusters: int, retrieved: int, group: int, dim: int) -> int:
    """Count the bytes of temporaries that moments take in a step, of one sequence and kv head.

    Args:
        config: the settings.
        clusters: room for them in the index.
        retrieved: the most tokens retrieved.
        group: query heads of the kv head.
        dim: numbers in a key.
    """
    rank = config.moment_rank
    if not rank:
        return 0
    # Directions, then weights, in float32; products and what they come to; sums of what is
    # retrieved, and mean values without it; the retrieved, as they are summed.
    of_clusters = rank * (dim + 4 * group) + 2 * dim + 4 * group
    return 4 * (clusters * of_clusters + 4 * retrieved * (dim + group + 1))
