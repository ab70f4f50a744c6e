"""The wave index: clusters of each sequence's tokens, and one-bit codes of the tokens."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

import pallas_kernels as ops
from pallas_kernels._numerics import NO_ID
from pallas_kernels.build_clusters import capacity
from pallas_kernels.encode_tokens import rotation
from wavejax._pytree import state
from wavejax.config import WaveConfig


@state
class WaveIndex:
    """What stays on the device of the indexed tokens (design, section 4).

    Index positions are the tokens of a sequence and kv head in cluster order. A segment's clusters
    hold its own tokens, so its positions and its tokens' rows fill the same range.

    Attributes:
        centroids: `[layers, batch, kv_heads, clusters, head_dim]`, plain means of the keys.
        value_sums: the same shape, sums of the members' values.
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
    """

    centroids: Array
    value_sums: Array
    offsets: Array
    num_clusters: Array
    codes: Array | None
    scales: Array | None
    token_ids: Array
    tokens: Array
    prompt_tokens: Array


def segment_sizes(config: WaveConfig, indexed: int) -> list[int]:
    """Cuts so many padded prompt tokens into segments: full ones, or a single shorter one."""
    if indexed <= config.segment_tokens:
        return [indexed] if indexed else []
    return [config.segment_tokens] * -(-indexed // config.segment_tokens)


def cluster_capacity(config: WaveConfig, segments: list[int], growths: int) -> int:
    """Room for the clusters of these prompt segments and of so many growth segments."""
    counts = collections.Counter(segments)
    counts[config.growth_tokens] += growths
    rooms = [
        count * capacity(size, config.cluster_size, config.max_cluster_size)
        for size, count in counts.items()
    ]
    return max(1, sum(rooms))


def init_index(
    config: WaveConfig,
    layers: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    clusters: int,
    tokens: int,
    dtype: DTypeLike,
) -> WaveIndex:
    """An empty index with room for so many clusters and tokens a row."""
    row = (layers, batch, kv_heads)
    words = -(-head_dim // 32)
    coded = config.token_codes
    return WaveIndex(
        centroids=jnp.zeros((*row, clusters, head_dim), dtype),
        value_sums=jnp.zeros((*row, clusters, head_dim), dtype),
        offsets=jnp.zeros((*row, clusters + 1), jnp.int32),
        num_clusters=jnp.zeros(row, jnp.int32),
        codes=jnp.zeros((*row, tokens, words), jnp.uint32) if coded else None,
        scales=jnp.zeros((*row, tokens), dtype) if coded else None,
        token_ids=jnp.zeros((*row, tokens), jnp.uint16),
        tokens=jnp.zeros(batch, jnp.int32),
        prompt_tokens=jnp.zeros(batch, jnp.int32),
    )


def clear(index: WaveIndex, layer: Int[Array, ""], sequence: Int[Array, ""]) -> WaveIndex:
    """Empties a sequence's index in one layer, for another prompt to take its place."""
    return dataclasses.replace(
        index,
        offsets=index.offsets.at[layer, sequence].set(0),
        num_clusters=index.num_clusters.at[layer, sequence].set(0),
    )


def append_segment(
    index: WaveIndex,
    config: WaveConfig,
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    start: Int[Array, ""] | int,
    keys: Float[Array, "kv_heads new head_dim"],
    values: Float[Array, "kv_heads new head_dim"],
    count: Int[Array, ""] | int,
) -> WaveIndex:
    """Clusters and encodes one segment and appends it to a sequence's index, in one layer.

    Does not move `tokens`: the caller does, once for all layers.

    Args:
        start: the segment's first position: what the index holds of the sequence already.
        keys, values: of the segment's tokens; anything past `count`.
        count: how many tokens the segment has.
    """
    clusters = ops.build_clusters(
        keys,
        values,
        count,
        cluster_size=config.cluster_size,
        max_cluster_size=config.max_cluster_size,
        iterations=config.kmeans_iterations,
    )
    kv_heads, room = clusters.centroids.shape[:2]
    dtype = index.centroids.dtype
    centroids = clusters.centroids.astype(dtype)
    new = jnp.sum(jnp.diff(clusters.offsets, axis=-1) > 0, axis=-1, dtype=jnp.int32)
    base = index.num_clusters[layer, sequence]

    head = jnp.arange(kv_heads)[:, None]
    nth = jnp.arange(room, dtype=jnp.int32)
    place = jnp.where(nth < new[:, None], base[:, None] + nth, NO_ID)
    at = (layer, sequence, head, place)

    # Edges past the new clusters all stand at the end, so clusters not in use are empty. The end
    # so far, not `start`: an empty segment of a padded prompt adds nothing and moves nothing.
    old = index.offsets[layer, sequence]
    end = jnp.take_along_axis(old, base[:, None], axis=-1)
    edge = jnp.arange(old.shape[-1], dtype=jnp.int32) - base[:, None]
    new_edges = end + jnp.take_along_axis(clusters.offsets, jnp.clip(edge, 0, room), axis=-1)
    offsets = jnp.where(edge <= 0, old, new_edges)

    codes, scales = index.codes, index.scales
    if codes is not None and scales is not None:
        position = jnp.arange(keys.shape[1])
        cluster = jax.vmap(lambda o: jnp.searchsorted(o, position, side="right") - 1)(
            clusters.offsets
        )
        own = jnp.take_along_axis(centroids, jnp.minimum(cluster, room - 1)[..., None], axis=1)
        ordered = jnp.take_along_axis(keys, clusters.order[..., None], axis=1)
        coded = ops.encode_tokens(ordered, own, jnp.asarray(rotation(keys.shape[-1])))
        codes = _write(codes, coded.codes, layer, sequence, start)
        scales = _write(scales, coded.scales, layer, sequence, start)
    return dataclasses.replace(
        index,
        centroids=index.centroids.at[at].set(centroids, mode="drop"),
        value_sums=index.value_sums.at[at].set(clusters.value_sums.astype(dtype), mode="drop"),
        offsets=index.offsets.at[layer, sequence].set(offsets),
        num_clusters=index.num_clusters.at[layer, sequence].set(base + new),
        codes=codes,
        scales=scales,
        token_ids=_write(index.token_ids, clusters.order, layer, sequence, start),
    )


def _write(stack: Array, block: Array, layer: Array, sequence: Array, start: Array | int) -> Array:
    index = (layer, sequence, 0, start, *(0,) * (stack.ndim - 4))
    return lax.dynamic_update_slice(
        stack,
        block[None, None].astype(stack.dtype),
        tuple(jnp.asarray(i, jnp.int32) for i in index),
    )
