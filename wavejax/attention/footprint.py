"""How many bytes an attention takes: what its state holds, and what its methods take besides."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.types import Rows
from wavejax.attention.moment_bytes import building_bytes, step_bytes
from wavejax.config import WaveConfig
from wavejax.store.index import segments_at_once
from wavejax.store.shape import CacheShape
from wavejax.store.sizes import segment_sizes
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a state, and of one layer's temporaries; in plain JAX, where kernels take less.

    Attributes:
        rows: of the state, all tokens' keys and values, without scales.
        index: of the state, what finds tokens.
        cache: of the state, the row cache with its table.
        steady: of the state, the rest: the steady zone, and scales of the rows if they have any.
        slots: KV rows that the cache holds, in each layer, sequence and kv head; a number.
        beside_attention: temporaries while a prompt is attended to, besides those of attending.
        writing: temporaries while a prompt's cache is written, its attention over.
        indexing: temporaries of building a prompt's index.
        step: temporaries of a decode step, over all sequences and kv heads.
        prompt_transfer, step_transfer: KV rows on their way, with a prompt and in a step, if they
            are staged.
    """

    rows: int
    index: int = 0
    cache: int = 0
    steady: int = 0
    slots: int = 0
    beside_attention: int = 0
    writing: int = 0
    indexing: int = 0
    step: int = 0
    prompt_transfer: int = 0
    step_transfer: int = 0


def plain_footprint(
    state: object, shape: CacheShape, heads: int, prompt_tokens: int, dtype: DTypeLike
) -> Footprint:
    """Count for an attention that holds keys and values of the tokens that it attends to.

    Args:
        state: arrays, or their shapes.
        shape: the layers and heads of the cache.
        heads: query heads.
        prompt_tokens: of the longest prompt, padding included.
        dtype: of the model's numbers.
    """
    rows, itemsize = nbytes(state), jnp.dtype(dtype).itemsize
    query, pair = heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    return Footprint(
        rows=rows,
        # Keys and values heads first, and once more as the cache is written; then the block of
        # queries is over.
        beside_attention=prompt_tokens * pair * itemsize // 2,
        writing=prompt_tokens * (4 * (query + pair) + query // 4) * itemsize,
        # A layer's keys and values, and its values in float32.
        step=rows // shape.layers * (itemsize + 2) // itemsize,
    )


def with_levels(
    plain: Footprint, rows: tuple[Rows, Rows], shape: CacheShape, prompt_tokens: int
) -> Footprint:
    """Correct the count of a state whose keys and values are levels with scales.

    Args:
        plain: as `plain_footprint` counts it.
        rows: its keys and its values.
        shape, prompt_tokens: as there.
    """
    levels = nbytes([each.data for each in rows])
    # Levels and scales of a layer, as they are rounded and heads first; which numbers are finite.
    rounded = 3 * prompt_tokens * shape.kv_heads * sum(each.row_bytes for each in rows)
    return dataclasses.replace(
        plain,
        rows=levels,
        steady=plain.rows - levels,
        beside_attention=plain.beside_attention + rounded,
        # Keys, or values, also in float32.
        writing=plain.writing + rounded + 4 * prompt_tokens * shape.kv_heads * shape.head_dim,
        # A layer's levels, and its keys and values in float32.
        step=levels // shape.layers * 5,
    )


def wave_footprint(
    config: WaveConfig,
    state: WaveState,
    shape: CacheShape,
    heads: int,
    prompt_tokens: int,
    dtype: DTypeLike,
) -> Footprint:
    """Count for wave attention; arguments as of `plain_footprint`, and the settings."""
    kept = state.index, state.cache, state.store.rows.data
    index, cache, rows = map(nbytes, kept)
    itemsize = jnp.dtype(dtype).itemsize
    query, pair = heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    arriving = _transfers(config, state)
    return Footprint(
        rows=rows,
        index=index,
        cache=cache,
        steady=nbytes(state) - index - cache - rows,
        slots=state.cache.rows.shape[3],
        # The rows side by side, padded for the window, and cut for the store; attention is over.
        # Rounded, they are written as they are made, but for those that leave the device.
        writing=prompt_tokens * ((4 * pair + query) * itemsize + _rounded(state, shape)),
        indexing=_indexing(config, shape, prompt_tokens, itemsize),
        step=_wave_step(config, state, heads, itemsize),
        prompt_transfer=arriving[0],
        step_transfer=arriving[1],
    )


def nbytes(tree: object) -> int:
    """Count the bytes of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _rounded(state: WaveState, shape: CacheShape) -> int:
    """Bytes of one token's levels and scales in a layer, if rows are rounded."""
    rows = state.store.rows
    return 0 if rows.scales is None else shape.kv_heads * rows.row_bytes


def _transfers(config: WaveConfig, state: WaveState) -> tuple[int, int]:
    """Bytes on the device of staged rows on their way: as a prompt is read, and in a step."""
    rows = state.store.rows
    layers, batch, kv_heads, tokens = rows.shape[:4]
    token = kv_heads * rows.row_bytes
    # A layer's rows leave while the next one is computed.
    prompt = tokens * token
    # Those of two layers, and one layer's as they are attended to, values in float32; or keys and
    # values, once as they are and once without what is not valid, if they are in int8.
    times = 4 if rows.scales is None else 10
    missed = times * batch * config.most_retrieved(tokens) * token
    # A growth's leave in all layers at once, while the next sequence's are cut out.
    grown = 2 * layers * config.growth_tokens * token
    return prompt, max(missed, grown)


def _indexing(config: WaveConfig, shape: CacheShape, room: int, itemsize: int) -> int:
    """Bytes of temporaries of the calls that build a prompt's index, in plain JAX or by kernels."""
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    sizes = segment_sizes(config, config.indexed_tokens(room))
    if not sizes:
        return 0
    # Made room for are the smallest clusters that a prompt of this room may have.
    clusters = -(-sizes[0] // config.size_steps[-1][0])
    # Plain JAX, segment by segment: keys and values in float32, centred keys, and what encoding
    # makes of them; the scores of all clusters and the matrix that sums members.
    plain = 4 * kv_heads * sizes[0] * (6 * head_dim + 3 * clusters)
    # Of all the call's segments: keys, values, centred keys, the same in cluster order, their
    # centroids; sums of the pieces; numbers.
    at_once = segments_at_once(len(sizes), kv_heads)
    tokens = sizes[0] * at_once
    one, all_moments = building_bytes(config, sizes[0], at_once, kv_heads, head_dim)
    plain = max(plain, one)
    return plain + kv_heads * tokens * (head_dim * (5 * itemsize + 1) + 32) + all_moments


def _wave_step(config: WaveConfig, state: WaveState, heads: int, itemsize: int) -> int:
    _, batch, kv_heads, clusters, head_dim = state.index.centroids.shape
    window = state.steady.window.shape[3] + state.steady.sink.shape[3]
    group = heads // kv_heads
    # Centroids and mean values in float32, of which those that are so need no copy but one; a
    # number for each cluster and query head, some for each token; the steady rows, once as they
    # are and once without what is not valid.
    copies = 2 if itemsize < 4 else 1
    head = 4 * clusters * (copies * head_dim + 4 * group)
    head += 8 * state.index.token_ids.shape[-1]
    head += 2 * window * 2 * head_dim * itemsize
    retrieved = config.most_retrieved(state.index.token_ids.shape[-1])
    head += step_bytes(config, clusters, retrieved, group, head_dim)
    if state.store.rows.scales is not None:
        # Levels read, and their numbers: as they are and without what is not valid.
        head += retrieved * 2 * head_dim * (1 + 2 * 4)
    if config.tolerance:
        head += _tolerance_step(config, state.index.token_ids.shape[-1], group, head_dim)
    return batch * kv_heads * head


def _tolerance_step(config: WaveConfig, tokens: int, group: int, head_dim: int) -> int:
    """Bytes of one kv head: drawn rows and what is made of them, and rows retrieved besides."""
    draws, row = config.tolerance_draws, 2 * head_dim * 4
    # Rows as they are and without what is not valid, mean values; of each query head its parts of
    # the sum, true, estimated and without their mean.
    drawn = draws * (2 * row + head_dim * 4 + group * 3 * head_dim * 4)
    more = min(config.most_retrieved(tokens) * config.tolerance_cap, tokens)
    return drawn + more * (2 * row + 32)
