"""A random index: lengths, clusters, and the order of the tokens in it."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.select_tokens import segment_start
from pallas_kernels.shapes import StepShape
from pallas_kernels.types import NO_ID


def lengths_of(shape: StepShape, ragged: bool) -> tuple[Array, Array]:
    """Indexed tokens of each sequence, and how many of them came with the prompt."""
    full = jnp.full(shape.batch, shape.tokens, jnp.int32)
    if not ragged:
        return full, full
    # Odd lengths of one half to all of the room, and a quarter of each grown after the prompt.
    nth = jnp.arange(shape.batch, dtype=jnp.int32)
    lengths = shape.tokens - nth * (shape.tokens // (2 * shape.batch)) - nth % 2 * 7
    grown = lengths // 4 // shape.growth_tokens * shape.growth_tokens
    if shape.batch > 1:
        lengths = lengths.at[-1].set(0)
    return lengths, jnp.maximum(lengths - grown, 0)


def offsets_of(key: Array, shape: StepShape, layers: int, lengths: Array) -> Array:
    """Clusters of 1 to `max_cluster_size` tokens that add up to each sequence's length."""
    mean = -(-shape.tokens // shape.clusters)
    spread = min(mean - 1, shape.max_cluster_size - mean)
    size = (layers, shape.batch, shape.kv_heads, -(-shape.clusters // 2), 1)
    # In pairs that add up to twice the mean, so that the total is exact.
    change = jax.random.randint(key, size, -spread, spread + 1)
    sizes = mean + jnp.concatenate([change, -change], axis=-1)
    ends = jnp.cumsum(sizes.reshape(*size[:3], -1), axis=-1, dtype=jnp.int32)
    ends = jnp.pad(ends, [(0, 0)] * 3 + [(1, shape.cluster_room)])
    ends = ends[..., : shape.cluster_room + 1]
    edge = jnp.arange(shape.cluster_room + 1)
    ends = jnp.where(edge < shape.clusters, ends, shape.tokens)
    return jnp.minimum(ends, lengths[:, None, None]).astype(jnp.int32)


def token_ids_of(
    key: Array, shape: StepShape, row: tuple[int, ...], lengths: Array, prompt_tokens: Array
) -> Array:
    """Draw a random order of each segment's tokens, counted from its start."""
    positions = jnp.broadcast_to(
        jnp.arange(shape.tokens, dtype=jnp.int32), (*row[1:], shape.tokens)
    )
    start = segment_start(positions, prompt_tokens, shape.segment_tokens, shape.growth_tokens)
    start = jnp.where(positions < lengths[:, None, None], start, NO_ID)
    start = jnp.broadcast_to(start, (*row, shape.tokens))
    return jnp.where(start < NO_ID, shuffle(key, start) - start, 0)


def shuffle(key: Array, groups: Array) -> Array:
    """List the places `0 ... n` of the last axis by group, in random order in each."""
    bits = jax.random.bits(key, groups.shape, jnp.uint32)
    place = jnp.broadcast_to(jnp.arange(groups.shape[-1], dtype=jnp.int32), groups.shape)
    return lax.sort((groups, bits, place), num_keys=2)[2]
