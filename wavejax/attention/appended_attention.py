"""Exact attention of appended tokens: to rows at hand, and to all stored rows of the sequence.

Every new token sees all stored rows, so their part needs no causal mask: cuDNN takes it where it
can, and its parts are merged by their masses; else blocks in plain JAX take them in one by one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Num

from pallas_kernels import _compat
from pallas_kernels.rounding import dequantise
from pallas_kernels.types import MASKED, Rows
from wavejax.attention.causal import implementation_for
from wavejax.attention.dense import DenseState
from wavejax.attention.protocol import PromptQuery, scale_of
from wavejax.store.rows import as_rows
from wavejax.store.state import WaveState

BLOCK = 2048  # Stored rows attended to at a time in plain JAX: bounds what logits take.
# cuDNN gives a head's queries to one program, whatever the rows: so many programs fill a GPU, each
# with rows of its own, if they are not too few to be worth a merge.
PROGRAMS, LEAST_ROWS = 256, 1024
MOST_ROWS = 2**17  # Of a call of cuDNN, which wants them copied: 64 MiB a head of 128 in bfloat16.

Running = tuple[Array, Array, Array]  # The largest logit so far, the weights' sum, the output.
# Of parts of the rows: outputs `[parts, tokens, heads, head_dim]`, and the logs of their masses.
Parts = tuple[Array, Array]


class Stored(NamedTuple):
    """A sequence's stored rows in one layer.

    Attributes:
        read: gives `block` rows from one on, `[kv_heads, block, 2, head_dim]`; called with (first
            row, block).
        room: rows that there is room for.
        tokens: int32 scalar, those in use, from the first on.
        on_host: whether they lie in host memory.
    """

    read: Callable[[Int[Array, ""], int], Float[Array, "kv_heads block 2 head_dim"]]
    room: int
    tokens: Int[Array, ""]
    on_host: bool = False


def attend(
    query: PromptQuery,
    rows: Float[Array, "kv_heads rows 2 head_dim"],
    seen: Bool[Array, "tokens rows"],
    stored: Stored,
) -> PromptQuery:
    """Attend exactly to rows at hand and to stored ones; softmax in float32.

    cuDNN takes keys and values in the query's dtype: rows in 8 bits are rounded to it there.

    Args:
        query: of the new tokens.
        rows: at hand: the new tokens' own, and what the sequence has besides its store.
        seen: which of them each new token sees: one at least.
        stored: the others, which all new tokens see.

    Returns:
        the output, in the query's dtype.
    """
    _, tokens, heads, head_dim = query.shape
    kv_heads = rows.shape[0]
    grouped = query[0].reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(1, 2, 0, 3)
    take_in = functools.partial(_take_in, grouped, scale_of(query))

    shape = grouped.shape[:3]
    nothing = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32)
    running = take_in(nothing, rows, seen)
    if chunks_of(stored.room) and not stored.on_host and _takes_cudnn(query):
        peak, total, output = running
        mass = (peak + jnp.log(total)).transpose(2, 0, 1).reshape(1, tokens, heads)
        own = _ungrouped(output / total[..., None], query), mass
        return _with_stored(query, stored, own).astype(query.dtype)
    block = min(BLOCK, stored.room)
    if block:

        def round_of(i: Array, running: Running) -> Running:
            # The last block is moved back into the room, and what was seen of it masked.
            start = jnp.minimum(i * block, stored.room - block)
            place = start + jnp.arange(block)
            seen = (place >= i * block) & (place < stored.tokens)
            seen = jnp.broadcast_to(seen, (tokens, block))
            return take_in(running, stored.read(start, block), seen)

        running = lax.fori_loop(0, (stored.tokens + block - 1) // block, round_of, running)
    _, total, output = running
    output = output / jnp.where(total > 0, total, 1.0)[..., None]
    return _ungrouped(output, query).astype(query.dtype)


def _take_in(
    grouped: Float[Array, "kv_heads group tokens head_dim"],
    scale: float,
    running: Running,
    rows: Float[Array, "kv_heads rows 2 head_dim"],
    seen: Bool[Array, "tokens rows"],
) -> Running:
    """Take more rows into a softmax."""
    peak, total, output = running
    # A row that is not seen may hold anything, NaN included.
    rows = jnp.where(jnp.any(seen, axis=0)[:, None, None], rows, 0)
    logits = scale * jnp.einsum(
        "hgtd,hnd->hgtn", grouped, rows[..., 0, :], preferred_element_type=jnp.float32
    )
    logits = jnp.where(seen, logits, MASKED)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
    weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None]), 0.0)
    kept = jnp.exp(peak - new_peak)
    values = rows[..., 1, :]
    added = jnp.einsum(
        "hgtn,hnd->hgtd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    total = total * kept + jnp.sum(weights, axis=-1)
    return new_peak, total, output * kept[..., None] + added


def _ungrouped(
    output: Float[Array, "kv_heads group tokens head_dim"], query: PromptQuery
) -> Float[Array, "1 tokens heads head_dim"]:
    return output.transpose(2, 0, 1, 3).reshape(query.shape)


def _takes_cudnn(query: PromptQuery) -> bool:
    return implementation_for(query.dtype, query.shape[-1]) == "cudnn"


def chunks_of(room: int) -> int:
    """Count the equal chunks, of `MOST_ROWS` at most, that stored rows are given to cuDNN in.

    A power of two; 0 where there are no rows, or no such chunks.
    """
    chunks = 1
    while room > MOST_ROWS * chunks:
        chunks *= 2
    return chunks if room and room % chunks == 0 else 0


def splits_of(rows: int, heads: int) -> int:
    """Count the parts of a chunk, each for programs of its own: a power of two."""
    splits = 1
    while (
        splits * heads < PROGRAMS
        and rows % (2 * splits) == 0
        and rows // (2 * splits) >= LEAST_ROWS
    ):
        splits *= 2
    return splits


def _with_stored(
    query: PromptQuery, stored: Stored, own: Parts
) -> Float[Array, "1 tokens heads head_dim"]:
    """Merge what rows at hand gave with what cuDNN gives of the stored ones, chunk by chunk."""
    chunks = chunks_of(stored.room)
    size = stored.room // chunks
    if chunks == 1:
        return _merged(own, _chunk_by_cudnn(query, stored, size, jnp.int32(0)))[0]

    def round_of(i: Array, state: Parts) -> Parts:
        return _merged(state, _chunk_by_cudnn(query, stored, size, i * size))

    return lax.fori_loop(0, (stored.tokens + size - 1) // size, round_of, own)[0]


def _chunk_by_cudnn(
    query: PromptQuery, stored: Stored, room: int, start: Int[Array, ""]
) -> tuple[Float[Array, "parts tokens heads head_dim"], Float[Array, "parts tokens heads"]]:
    """Attend to `room` stored rows, from `start` on."""
    rows, tokens = stored.read(start, room), stored.tokens - start
    # cuDNN would multiply what lies past the last token by zero, which NaN survives.
    used = jnp.arange(room, dtype=jnp.int32) < tokens
    rows = jnp.where(used[:, None, None], rows, 0).astype(query.dtype)
    kv_heads, _, _, head_dim = rows.shape
    splits = splits_of(room, query.shape[2])
    size = room // splits
    parts = rows.reshape(kv_heads, splits, size, 2, head_dim).transpose(3, 1, 2, 0, 4)
    lengths = tokens - size * jnp.arange(splits, dtype=jnp.int32)
    # At least one row of each part, which is left out where there is none.
    output, mass = jax.nn.dot_product_attention(
        jnp.broadcast_to(query, (splits, *query.shape[1:])),
        *parts,
        scale=scale_of(query),
        key_value_seq_lengths=jnp.clip(lengths, 1, size),
        implementation="cudnn",
        return_residual=True,
    )
    return output, jnp.where((lengths > 0)[:, None, None], mass, MASKED)


def _merged(one: Parts, parts: Parts) -> Parts:
    """Merge outputs `[parts, tokens, heads, head_dim]` by the logs of their masses; float32."""
    masses = jnp.concatenate([one[1], parts[1]])
    shares = jax.nn.softmax(masses, axis=0)[..., None]
    output = shares[:1] * one[0] + jnp.sum(shares[1:] * parts[0], axis=0, keepdims=True)
    return output, jax.nn.logsumexp(masses, axis=0, keepdims=True)


def stored_dense(state: DenseState, layer: Array, sequence: Array) -> Stored:
    """Return the rows of full attention's cache."""

    def cut(array: Array, start: Array, block: int) -> Array:
        rest = array.shape[4:]
        where = (layer, sequence, jnp.int32(0), start, *(jnp.int32(0) for _ in rest))
        return lax.dynamic_slice(array, where, (1, 1, array.shape[2], block, *rest))[0, 0]

    def read(start: Array, block: int) -> Array:
        def both(rows: Rows) -> Array:
            return dequantise(jax.tree.map(lambda x: cut(x, start, block), rows))

        return as_rows(both(state.keys), both(state.values))

    return Stored(read, state.keys.shape[3], state.tokens[sequence])


def stored_wave(
    state: WaveState,
    layer: Array,
    sequence: Array,
    staged: Num[Array, "kv_heads stored 2 head_dim"] | None,
) -> Stored:
    """Return the rows of the row store, wherever it is.

    Args:
        state: whose they are.
        layer, sequence: int32.
        staged: the sequence's rows in this layer, where the state has none.
    """
    rows, scales = state.store.rows
    kv_heads, room = rows.shape[2], rows.shape[3] if staged is None else staged.shape[1]
    on_host = staged is None and jax.typeof(rows).memory_space == jax.memory.Space.Host

    def of_scales(start: Array, block: int) -> Array | None:
        if scales is None:
            return None
        where = (layer, sequence, jnp.int32(0), start, jnp.int32(0))
        return lax.dynamic_slice(scales, where, (1, 1, kv_heads, block, 2))[0, 0]

    def of_rows(start: Array, block: int) -> Array:
        if staged is not None:
            return lax.dynamic_slice_in_dim(staged, start, block, axis=1)
        cut = functools.partial(_cut, sizes=(1, 1, kv_heads, block, *rows.shape[4:]))
        where = jnp.stack([layer, sequence, start]).astype(jnp.int32)
        if not on_host:
            return cut(rows, where)
        # XLA does not gather across memories: the host's processor does, and one transfer follows.
        where = jax.device_put(where, jax.memory.Space.Host)
        return jax.device_put(_compat.run_on_host(cut, rows, where), jax.memory.Space.Device)

    def read(start: Array, block: int) -> Array:
        return dequantise(Rows(of_rows(start, block), of_scales(start, block)))

    return Stored(read, room, state.index.tokens[sequence], on_host)


def _cut(rows: Array, where: Array, sizes: tuple[int, ...]) -> Array:
    """Take rows of one layer and sequence, from (layer, sequence, row) on."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(0, 1, 2, 3), collapsed_slice_dims=(0, 1), start_index_map=(0, 1, 3)
    )
    return lax.gather(rows, where, numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
