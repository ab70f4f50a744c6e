"""The wave index: clusters of each sequence's tokens, and one-bit codes of the tokens."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

import pallas_kernels as ops
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.numerics import NO_ID
from wavejax._pytree import state
from wavejax.config import WaveConfig
from wavejax.store.shape import STACK, CacheShape

# Segments times kv heads in one call of `build_clusters`: 131,072 tokens of 8 kv heads.
ROWS_AT_ONCE = 128


@state
class WaveIndex:
    """What stays on the device of the indexed tokens (design, section 4).

    Index positions are the tokens of a sequence and kv head in cluster order. A segment's clusters
    hold its own tokens, so its positions and its tokens' rows fill the same range.

    Attributes:
        centroids: `[layers, batch, kv_heads, clusters, head_dim]`, plain means of the keys.
        value_means: the same shape, plain means of the members' values.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32: cluster j holds the positions
            offsets[j] to offsets[j + 1].
        num_clusters: `[layers, batch, kv_heads]` int32, clusters in use.
        codes: `[layers, batch, kv_heads, tokens, ceil(head_dim / 32)]` uint32, by position; None
            without token codes, like `scales`.
        scales: `[layers, batch, kv_heads, tokens]`, the codes' scales.
        token_ids: `[layers, batch, kv_heads, tokens]` uint16, the token at each position, counted
            from its segment's start.
        tokens: `[batch]` int32, tokens in the index.
        prompt_tokens: `[batch]` int32, how many of them came with the prompt.
        growths: int32 scalar, how many times each sequence's index may grow: what there is room
            for, whatever its prompt's length.
    """

    centroids: Array
    value_means: Array
    offsets: Array
    num_clusters: Array
    codes: Array | None
    scales: Array | None
    token_ids: Array
    tokens: Array
    prompt_tokens: Array
    growths: Array

    AXES: ClassVar = {
        "centroids": (*STACK, "clusters", "head_dim"),
        "value_means": (*STACK, "clusters", "head_dim"),
        "offsets": (*STACK, "cluster_edges"),
        "num_clusters": STACK,
        "codes": (*STACK, "tokens", "code_words"),
        "scales": (*STACK, "tokens"),
        "token_ids": (*STACK, "tokens"),
        "tokens": ("sequences",),
        "prompt_tokens": ("sequences",),
        "growths": (),
    }


def segment_sizes(config: WaveConfig, indexed: int) -> list[int]:
    """Cuts so many padded prompt tokens into segments: full ones, or a single shorter one."""
    if indexed <= config.segment_tokens:
        return [indexed] if indexed else []
    return [config.segment_tokens] * -(-indexed // config.segment_tokens)


def cluster_capacity(config: WaveConfig, segments: list[int], growths: int) -> int:
    """Room for the clusters of any prompt of these segments or fewer tokens, and of its growth.

    A short prompt has clusters of another size than a long one. So it may have more of them.
    """
    longest, size = sum(segments), max(segments, default=1)
    clusters, ends_before = 1, longest + 1
    for mean, most, least in config.size_steps:
        if least >= ends_before:
            continue  # all prompts are shorter
        # As `ops.build_clusters.capacity` counts, of the longest prompt of this size; growing, the
        # shortest has the smallest clusters of all.
        prompt = ends_before - 1
        own = prompt // size * -(-size // mean) + -(-(prompt % size) // mean) + prompt // most
        grown = 0
        for nth in range(1, growths + 1):
            mean, most = config.cluster_sizes(least + nth * config.growth_tokens)
            grown += -(-config.growth_tokens // mean) + config.growth_tokens // most
        clusters, ends_before = max(clusters, own + grown), least
    return max(1, min(clusters, longest + growths * config.growth_tokens))


def sizes_of(config: WaveConfig, tokens: Int[Array, ""]) -> tuple[Array, Array]:
    """`WaveConfig.cluster_sizes` of a number of tokens known only when the program runs."""
    *steps, (mean, most, _) = config.size_steps
    sizes = jnp.int32(mean), jnp.int32(most)
    for mean, most, least in reversed(steps):
        reached = tokens >= min(least, 2**31 - 1)
        sizes = jnp.where(reached, mean, sizes[0]), jnp.where(reached, most, sizes[1])
    return sizes


def init_index(
    config: WaveConfig,
    shape: CacheShape,
    batch: int,
    clusters: int,
    tokens: int,
    growths: int,
    dtype: DTypeLike,
) -> WaveIndex:
    """An empty index.

    Args:
        config: the settings.
        shape: the layers and heads.
        batch: sequences.
        clusters: room for this many in each head.
        tokens: room for this many in each head.
        growths: how many times each sequence's index may grow.
        dtype: of centroids, mean values and scales.
    """
    stack, head_dim = shape.stack(batch), shape.head_dim
    words = -(-head_dim // 32)
    coded = config.token_codes
    return WaveIndex(
        centroids=jnp.zeros((*stack, clusters, head_dim), dtype),
        value_means=jnp.zeros((*stack, clusters, head_dim), dtype),
        offsets=jnp.zeros((*stack, clusters + 1), jnp.int32),
        num_clusters=jnp.zeros(stack, jnp.int32),
        codes=jnp.zeros((*stack, tokens, words), jnp.uint32) if coded else None,
        scales=jnp.zeros((*stack, tokens), dtype) if coded else None,
        token_ids=jnp.zeros((*stack, tokens), jnp.uint16),
        tokens=jnp.zeros(batch, jnp.int32),
        prompt_tokens=jnp.zeros(batch, jnp.int32),
        growths=jnp.int32(growths),
    )


def clear(index: WaveIndex, layer: Int[Array, ""], sequence: Int[Array, ""]) -> WaveIndex:
    """Empties a sequence's index in one layer, for another prompt to take its place."""
    return dataclasses.replace(
        index,
        offsets=index.offsets.at[layer, sequence].set(0),
        num_clusters=index.num_clusters.at[layer, sequence].set(0),
    )


def append_prompt(
    index: WaveIndex,
    config: WaveConfig,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    rows: Float[Array, "kv_heads tokens 2 head_dim"],
    count: Int[Array, ""],
) -> WaveIndex:
    """Clusters and encodes a prompt and appends it to a sequence's index, in one layer.

    As many segments at once as make `ROWS_AT_ONCE` rows: kernels are fast where all their programs
    have work, and temporaries stay bounded whatever the prompt's length.

    Args:
        rows: the prompt's indexed tokens', padded to `segment_sizes`; anything past `count`.
        count: tokens to index.
    """
    kv_heads, room = rows.shape[:2]
    size = min(room, config.segment_tokens)
    segments = room // size if size else 0
    at_once = segments_at_once(segments, kv_heads)

    def append(index: WaveIndex, first: Array | int, segments: int) -> WaveIndex:
        tokens = segments * size
        part = lax.dynamic_slice_in_dim(rows, first * size, tokens, axis=1)
        part = part.reshape(kv_heads, segments, size, *part.shape[2:]).swapaxes(0, 1)
        counts = jnp.clip(count - (first + jnp.arange(segments)) * size, 0, size)
        return append_segments(
            index,
            config,
            layer,
            sequence,
            first * size,
            part[..., 0, :],
            part[..., 1, :],
            counts.astype(jnp.int32),
            count,
        )

    calls, rest = divmod(segments, at_once)
    if calls > 1:
        index = lax.fori_loop(0, calls, lambda i, x: append(x, i * at_once, at_once), index)
    elif calls:
        index = append(index, 0, at_once)
    return append(index, calls * at_once, rest) if rest else index


def segments_at_once(segments: int, kv_heads: int) -> int:
    """How many of a prompt's segments are clustered in one call: in even parts, at least one."""
    most = max(1, ROWS_AT_ONCE // kv_heads)
    calls = max(1, -(-segments // most))
    return max(1, -(-segments // calls))


def append_segments(
    index: WaveIndex,
    config: WaveConfig,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    start: Int[Array, ""] | int,
    keys: Float[Array, "segments kv_heads new head_dim"],
    values: Float[Array, "segments kv_heads new head_dim"],
    counts: Int[Array, " segments"],
    tokens: Int[Array, ""],
) -> WaveIndex:
    """Clusters and encodes segments and appends them to a sequence's index, in one layer.

    The same as appending them one after another. Does not move `tokens`: the caller does, once for
    all layers.

    Args:
        start: the first segment's first position: what the index holds of the sequence already.
        keys, values: of the segments' tokens; anything past a segment's count.
        counts: int32, how many tokens each segment has: all `new` of them before one that has
            fewer, and none after it.
        tokens: int32, how many the sequence will have in its index with them and what comes with
            them: they choose the clusters' size.
    """
    cluster_size, max_cluster_size = sizes_of(config, tokens)
    clusters = ops.build_clusters(
        keys,
        values,
        counts[:, None],
        cluster_size=cluster_size,
        max_cluster_size=max_cluster_size,
        iterations=config.kmeans_iterations,
        least_sizes=config.size_steps[-1][:2],
    )
    kv_heads, room = clusters.centroids.shape[1:3]
    dtype = index.centroids.dtype
    sizes = jnp.diff(clusters.offsets, axis=-1)
    new = jnp.sum(sizes > 0, axis=-1, dtype=jnp.int32)
    base = index.num_clusters[layer, sequence]
    ends = base + jnp.cumsum(new, axis=0)

    head = jnp.arange(kv_heads)[:, None]
    first = (ends - new)[..., None]
    nth = jnp.arange(room, dtype=jnp.int32)
    place = jnp.where(nth < new[..., None], first + nth, NO_ID)
    at = (layer, sequence, head, place)
    centroids = index.centroids.at[at].set(clusters.centroids.astype(dtype), mode="drop")

    # Edges past the new clusters all stand at the end, so clusters not in use are empty. The end
    # so far, not `start`: an empty segment of a padded prompt adds nothing and moves nothing.
    old = index.offsets[layer, sequence]
    end = jnp.take_along_axis(old, base[:, None], axis=-1)
    added = jnp.zeros((kv_heads, old.shape[-1] - 1), jnp.int32)
    added = added.at[head, place].set(sizes, mode="drop")
    edges = end + jnp.pad(jnp.cumsum(added, axis=-1), ((0, 0), (1, 0)))
    offsets = jnp.where(jnp.arange(old.shape[-1]) <= base[:, None], old, edges)

    def write(stack: Array, blocks: Array) -> Array:
        whole = jnp.swapaxes(blocks, 0, 1).reshape(kv_heads, -1, *blocks.shape[3:])
        return _write(stack, whole, layer, sequence, start)

    codes, scales = index.codes, index.scales
    if codes is not None and scales is not None:
        position = jnp.arange(keys.shape[2])
        # Unrolled: on a GPU a loop's rounds cost more than the search.
        search = functools.partial(
            jnp.searchsorted, v=position, side="right", method="scan_unrolled"
        )
        cluster = jax.vmap(jax.vmap(search))(clusters.offsets) - 1
        # Read back, or XLA might compute them anew, rounded otherwise than those that are stored.
        near = first + jnp.minimum(cluster, jnp.maximum(new[..., None] - 1, 0))
        own = centroids.at[layer, sequence, head, near].get(mode="clip")
        ordered = jnp.take_along_axis(keys, clusters.order[..., None], axis=2)
        coded = ops.encode_tokens(ordered, own, jnp.asarray(rotation(keys.shape[-1])))
        codes, scales = write(codes, coded.codes), write(scales, coded.scales)
    return dataclasses.replace(
        index,
        centroids=centroids,
        value_means=index.value_means.at[at].set(clusters.value_means.astype(dtype), mode="drop"),
        offsets=index.offsets.at[layer, sequence].set(offsets),
        num_clusters=index.num_clusters.at[layer, sequence].set(ends[-1]),
        codes=codes,
        scales=scales,
        token_ids=write(index.token_ids, clusters.order),
    )


def _write(stack: Array, block: Array, layer: Array, sequence: Array, start: Array | int) -> Array:
    index = (layer, sequence, 0, start, *(0,) * (stack.ndim - 4))
    return lax.dynamic_update_slice(
        stack,
        block[None, None].astype(stack.dtype),
        tuple(jnp.asarray(i, jnp.int32) for i in index),
    )
