"""The sizes of an index: segments of a prompt, clusters, and tokens in each."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from wavejax.config import WaveConfig


def segment_sizes(config: WaveConfig, indexed: int) -> list[int]:
    """Cut padded prompt tokens into segments: full ones, or a single shorter one."""
    if indexed <= config.segment_tokens:
        return [indexed] if indexed else []
    return [config.segment_tokens] * -(-indexed // config.segment_tokens)


def index_room(
    config: WaveConfig, prompt_tokens: int, new_tokens: int, shortest_prompt: int
) -> tuple[int, int, int]:
    """Count what an index is to hold: tokens, clusters, and segments that it grows by.

    Args:
        config: the settings.
        prompt_tokens: of the longest prompt, padding included.
        new_tokens: that come after it.
        shortest_prompt: tokens of the shortest prompt.
    """
    segments = segment_sizes(config, config.indexed_tokens(prompt_tokens))
    # What is generated fills the window's free room first; a prompt that is short of its bucket
    # may leave the window nearly full.
    growths = -(-new_tokens // config.growth_tokens)
    tokens = max(1, sum(segments) + growths * config.growth_tokens)
    shortest = config.indexed_tokens(shortest_prompt)
    return tokens, cluster_capacity(config, segments, growths, shortest), growths


def cluster_capacity(
    config: WaveConfig, segments: list[int], growths: int, shortest: int = 0
) -> int:
    """Count the clusters that a prompt of these segments, or a shorter one, may have and grow.

    A short prompt has clusters of another size than a long one. So it may have more of them.

    Args:
        config: the settings.
        segments: of the longest prompt's indexed tokens.
        growths: segments that the index may grow by.
        shortest: indexed tokens of the shortest prompt, unpadded.
    """
    longest, size = sum(segments), max(segments, default=1)
    clusters, ends_before = 1, longest + 1
    for mean, most, least in config.size_steps:
        if least >= ends_before:
            continue  # all prompts are shorter
        if shortest >= ends_before:
            break  # all prompts are longer
        # None is shorter than `shortest`, nor than this size's least.
        least = max(least, shortest)
        # As `ops.build_clusters.capacity` counts, of the longest prompt of this size; growing, the
        # shortest has the smallest clusters of all.
        prompt = ends_before - 1
        own = prompt // size * -(-size // mean) + -(-(prompt % size) // mean) + prompt // most
        grown = _clusters_grown(config, least, growths)
        clusters, ends_before = max(clusters, own + grown), least
    return max(1, min(clusters, longest + growths * config.growth_tokens))


def _clusters_grown(config: WaveConfig, tokens: int, growths: int) -> int:
    """Count the most clusters that an index of so many tokens gets by growing so many times."""
    size, clusters, left = config.growth_tokens, 0, growths
    for mean, most, least in config.size_steps:
        # Those whose tokens reach this size come last: counted, not gone through one by one.
        before = min(left, max(0, -(-(least - tokens) // size) - 1))
        clusters += (left - before) * (-(-size // mean) + size // most)
        left = before
    return clusters


def sizes_of(config: WaveConfig, tokens: Int[Array, ""]) -> tuple[Array, Array]:
    """`WaveConfig.cluster_sizes` of a number of tokens known only when the program runs."""
    *steps, (mean, most, _) = config.size_steps
    sizes = jnp.int32(mean), jnp.int32(most)
    for mean, most, least in reversed(steps):
        if least > jnp.iinfo(tokens.dtype).max:
            break  # and so are the larger ones: no number of tokens reaches them
        reached = tokens >= least
        sizes = jnp.where(reached, mean, sizes[0]), jnp.where(reached, most, sizes[1])
    return sizes
