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
from pallas_kernels.types import NO_ID, Moments, Spread
from wavejax._pytree import state
from wavejax.config import WaveConfig
from wavejax.store.covariance import init_covariance, put_covariance
from wavejax.store.deviations import init_deviations, put_deviations
from wavejax.store.moments import (
    MOMENT_AXES,
    SPREAD_AXES,
    init_moments,
    init_spread,
    put_moments,
    put_spread,
)
from wavejax.store.shape import STACK, CacheShape
from wavejax.store.sizes import sizes_of

# Segments times kv heads in one call of `build_clusters`: 131,072 tokens of 8 kv heads.
HEAD_SEGMENTS_AT_ONCE = 128


@state
class WaveIndex:
    """Clusters of the indexed tokens, and their codes, on the device.

    An index place counts a head's tokens in cluster order; a store row counts them in the text's
    order. A segment's clusters hold its own tokens, so its index places and its store rows are the
    same range.

    Attributes:
        centroids: `[layers, batch, kv_heads, clusters, head_dim]`, plain means of the keys.
        value_means: the same shape, plain means of the members' values.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32: cluster j holds the index
            places offsets[j] to offsets[j + 1].
        num_clusters: `[layers, batch, kv_heads]` int32, clusters in use.
        codes: `[layers, batch, kv_heads, tokens, ceil(head_dim / 32)]` uint32, by index
            place; None without token codes, like `scales`.
        scales: `[layers, batch, kv_heads, tokens]`, the codes' scales, by index place.
        deviations: `[layers, batch, kv_heads, clusters]`, of `Reach` and `Pooled`; None without.
        covariance: `[layers, batch, kv_heads, 2, head_dim, head_dim]`, the two matrices of
            `Pooled`, of the first segment's members; None without.
        token_ids: `[layers, batch, kv_heads, tokens]` uint16, the store row at each index place,
            counted from its segment's first one.
        tokens: `[batch]` int32, tokens in the index.
        prompt_tokens: `[batch]` int32, how many of them came with the prompt.
        growths: int32 scalar, how many times each sequence's index may grow: what there is room
            for, whatever its prompt's length.
        moments, spread: of the clusters, `[layers, batch, kv_heads, clusters, ...]`; None without.
    """

    centroids: Array
    value_means: Array
    offsets: Array
    num_clusters: Array
    codes: Array | None
    scales: Array | None
    deviations: Array | None
    covariance: Array | None
    token_ids: Array
    tokens: Array
    prompt_tokens: Array
    growths: Array
    moments: Moments | None
    spread: Spread | None

    AXES: ClassVar = {
        "centroids": (*STACK, "clusters", "head_dim"),
        "value_means": (*STACK, "clusters", "head_dim"),
        "offsets": (*STACK, "cluster_edges"),
        "num_clusters": STACK,
        "codes": (*STACK, "tokens", "code_words"),
        "scales": (*STACK, "tokens"),
        "deviations": (*STACK, "clusters"),
        "covariance": (*STACK, "key_value", "vectors", "head_dim"),
        "token_ids": (*STACK, "tokens"),
        "tokens": ("sequences",),
        "prompt_tokens": ("sequences",),
        "growths": (),
        "moments": MOMENT_AXES,
        "spread": SPREAD_AXES,
    }


def init_index(
    config: WaveConfig,
    shape: CacheShape,
    batch: int,
    clusters: int,
    tokens: int,
    growths: int,
    dtype: DTypeLike,
) -> WaveIndex:
    """Make an empty index.

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
        deviations=init_deviations(config, (*stack, clusters), dtype),
        covariance=init_covariance(config, stack, head_dim, dtype),
        token_ids=jnp.zeros((*stack, tokens), jnp.uint16),
        tokens=jnp.zeros(batch, jnp.int32),
        prompt_tokens=jnp.zeros(batch, jnp.int32),
        growths=jnp.int32(growths),
        moments=init_moments(config, (*stack, clusters), head_dim, dtype),
        spread=init_spread(config, (*stack, clusters)),
    )


def clear(index: WaveIndex, layer: Int[Array, ""], sequence: Int[Array, ""]) -> WaveIndex:
    """Empty a sequence's index in one layer, for another prompt to replace it."""
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
    """Cluster and encode a prompt and append it to a sequence's index, in one layer.

    `HEAD_SEGMENTS_AT_ONCE` bounds what one call takes: kernels are fast where all their programs
    have work, and temporaries stay bounded whatever the prompt's length.

    Args:
        index: before this layer; emptied for this sequence.
        config: the settings.
        layer: int32, which layer.
        sequence: int32, whose index to write.
        rows: the prompt's KV rows, by store row, padded to `segment_sizes`; anything past `count`.
        count: int32, tokens to index.
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
            part,
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
    """Count the segments of a prompt that one call clusters: even parts, at least one."""
    most = max(1, HEAD_SEGMENTS_AT_ONCE // kv_heads)
    calls = max(1, -(-segments // most))
    return max(1, -(-segments // calls))


def append_segments(
    index: WaveIndex,
    config: WaveConfig,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    start: Int[Array, ""] | int,
    rows: Float[Array, "segments kv_heads new 2 head_dim"],
    counts: Int[Array, " segments"],
    tokens: Int[Array, ""],
) -> WaveIndex:
    """Cluster and encode segments and append them to a sequence's index, in one layer.

    The same as appending them one after another. Does not move `tokens`: the caller does, once for
    all layers.

    Args:
        index: before these segments.
        config: the settings.
        layer: int32, which layer.
        sequence: int32, whose index to write.
        start: the first segment's first store row: the tokens that the index holds already.
        rows: the segments' KV rows, by store row; anything past a segment's count.
        counts: int32, how many tokens each segment has: all `new` of them before one that has
            fewer, and none after it.
        tokens: int32, how many the sequence will have in its index with them and what comes with
            them: they choose the clusters' size.
    """
    keys, values = rows[..., 0, :], rows[..., 1, :]
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
    number = jnp.where(nth < new[..., None], first + nth, NO_ID)
    at = (layer, sequence, head, number)
    centroids = index.centroids.at[at].set(clusters.centroids.astype(dtype), mode="drop")

    # Edges past the new clusters all stand at the end, so clusters not in use are empty. The end
    # so far, not `start`: an empty segment of a padded prompt adds nothing and moves nothing.
    old = index.offsets[layer, sequence]
    end = jnp.take_along_axis(old, base[:, None], axis=-1)
    added = jnp.zeros((kv_heads, old.shape[-1] - 1), jnp.int32)
    added = added.at[head, number].set(sizes, mode="drop")
    edges = end + jnp.pad(jnp.cumsum(added, axis=-1), ((0, 0), (1, 0)))
    offsets = jnp.where(jnp.arange(old.shape[-1]) <= base[:, None], old, edges)

    def write(stack: Array, blocks: Array) -> Array:
        whole = jnp.swapaxes(blocks, 0, 1).reshape(kv_heads, -1, *blocks.shape[3:])
        return _write(stack, whole, layer, sequence, start)

    codes, scales, deviations = index.codes, index.scales, index.deviations
    covariance = index.covariance
    if codes is not None and scales is not None:
        place = jnp.arange(keys.shape[2])
        # Unrolled: on a GPU a loop's rounds cost more than the search.
        search = functools.partial(jnp.searchsorted, v=place, side="right", method="scan_unrolled")
        cluster = jax.vmap(jax.vmap(search))(clusters.offsets) - 1
        # Read back, or XLA might compute them anew, rounded otherwise than those that are stored.
        near = first + jnp.minimum(cluster, jnp.maximum(new[..., None] - 1, 0))
        own = centroids.at[layer, sequence, head, near].get(mode="clip")
        ordered = jnp.take_along_axis(keys, clusters.order[..., None], axis=2)
        coded = ops.encode_tokens(ordered, own, jnp.asarray(rotation(keys.shape[-1])))
        codes, scales = write(codes, coded.codes), write(scales, coded.scales)
        deviations = put_deviations(deviations, coded.scales, cluster, clusters.offsets, at)
        # Of the first segment alone: so it stays where segments grow, or are cut off.
        given = ordered[0], own[0], values[0], cluster[0], jax.tree.map(lambda x: x[0], clusters)
        covariance = put_covariance(covariance, *given, (layer, sequence), new=start == 0)
    return dataclasses.replace(
        index,
        centroids=centroids,
        value_means=index.value_means.at[at].set(clusters.value_means.astype(dtype), mode="drop"),
        offsets=index.offsets.at[layer, sequence].set(offsets),
        num_clusters=index.num_clusters.at[layer, sequence].set(ends[-1]),
        codes=codes,
        scales=scales,
        deviations=deviations,
        covariance=covariance,
        token_ids=write(index.token_ids, clusters.order),
        moments=put_moments(index.moments, keys, values, clusters, at),
        spread=put_spread(index.spread, keys, values, clusters, at),
    )


def _write(stack: Array, block: Array, layer: Array, sequence: Array, start: Array | int) -> Array:
    index = (layer, sequence, 0, start, *(0,) * (stack.ndim - 4))
    return lax.dynamic_update_slice(
        stack,
        block[None, None].astype(stack.dtype),
        tuple(jnp.asarray(i, jnp.int32) for i in index),
    )
