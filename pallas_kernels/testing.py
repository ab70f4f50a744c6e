"""Random but realistic inputs of a decode step, for tests and benchmarks."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.encode_tokens import rotate
from pallas_kernels.rows import is_held
from pallas_kernels.select_tokens import segment_start
from pallas_kernels.shapes import StepShape
from pallas_kernels.types import EMPTY, NO_ID, RowTable

# With unit normals for keys the logits then have this standard deviation: a softmax's tail as
# trained models have it.
QUERY_SIZE = 2.5

# The decode step that the inputs are for: later than any slot's last use.
STEP = 1000


class StepInputs(NamedTuple):
    """What the ops of one decode step read; shapes as in the ops' own signatures.

    Attributes:
        query, rotated_query: the query, and in float32 the same rotated as the codes are.
        centroids, value_means, offsets: the clusters, `layers` deep like all that follows.
        codes, scales, token_ids: the tokens, in cluster order.
        store, cache_rows, table: the rows, those in the row cache, and its table. All slots are
            taken; the table's fields are inverse to each other.
        sink, sink_tokens, window, window_tokens: the steady zone.
        lengths, prompt_tokens: `[batch]` int32, indexed tokens, and those of them of the prompt.
        candidate_budget, retrieved_budget: `[batch]` int32.
        step: the row cache's clock.
        tokens, slots, hit, remaining: what `select_tokens` might hand on, for `attend_zones`
            alone: random rows, of which the share `miss_share` misses.
    """

    query: Array
    rotated_query: Array
    centroids: Array
    value_means: Array
    offsets: Array
    codes: Array
    scales: Array
    token_ids: Array
    store: Array
    cache_rows: Array
    table: RowTable
    sink: Array
    sink_tokens: Array
    window: Array
    window_tokens: Array
    lengths: Array
    prompt_tokens: Array
    candidate_budget: Array
    retrieved_budget: Array
    step: Array
    tokens: Array
    slots: Array
    hit: Array
    remaining: Array


def make_step(
    shape: StepShape,
    seed: int,
    *,
    layers: int = 1,
    ragged: bool = False,
    poison: bool = False,
    miss_share: float = 0.0,
    store: Literal["device", "host"] = "device",
) -> StepInputs:
    """Makes a step's inputs on the device, in one program.

    Args:
        shape: their shape.
        seed: the same seed makes the same inputs.
        layers: depth of the stacks.
        ragged: sequences differ in length, clusters in use and steady rows; if there are more
            than one, the last has nothing indexed, retrieves nothing and has no window.
        poison: what no op may read is NaN, or for ids out of range: rows that are not in the lists
            `tokens` and `slots` (but for each store row's first), clusters not in use, ...
        miss_share: share of `tokens` that misses.
        store: where the store lies: "host" is pinned host memory.
    """
    # Any generator will do, and this one compiles ten times as fast as the default.
    key = jax.random.key(seed, impl="unsafe_rbg")
    inputs = _make(key, shape, layers, ragged, poison, miss_share)
    if store == "host":
        inputs = inputs._replace(store=jax.device_put(inputs.store, jax.memory.Space.Host))
    return inputs


@functools.partial(jax.jit, static_argnums=1)
def with_misses(
    inputs: StepInputs, shape: StepShape, seed: int, miss_share: float | Array
) -> StepInputs:
    """The same inputs with other rows in the cache and other rows to read, nothing poisoned."""
    key = jax.random.key(seed, impl="unsafe_rbg")
    row = inputs.table.token_of_slot.shape[:3]
    count = inputs.retrieved_budget
    table, reads = _rows_to_read(key, shape, row, inputs.lengths, count, miss_share)
    return inputs._replace(table=table, tokens=reads[0], slots=reads[1], hit=reads[2])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _make(
    key: Array, shape: StepShape, layers: int, ragged: bool, poison: bool, miss_share: float | Array
) -> StepInputs:
    row = (layers, shape.batch, shape.kv_heads)
    keys = iter(jax.random.split(key, 16))
    dtype = jnp.dtype(shape.dtype)

    def normal(*size: int) -> Array:
        return _normal(next(keys), size, dtype)

    lengths, prompt_tokens = _lengths(shape, ragged)
    offsets = _offsets(next(keys), shape, layers, lengths)
    sizes = jnp.diff(offsets, axis=-1)
    held = jnp.arange(shape.tokens) < lengths[:, None, None]

    query = (QUERY_SIZE * normal(shape.batch, shape.kv_heads, shape.group, shape.head_dim)).astype(
        dtype
    )
    share = (jnp.arange(shape.batch) + 1) % 4 / 4 if ragged else jnp.ones(shape.batch)
    sink_tokens = jnp.ceil(share * shape.sinks).astype(jnp.int32)
    # Half full, as it is on average.
    window_tokens = jnp.ceil(share * (shape.window // 2)).astype(jnp.int32)
    if ragged and shape.batch > 1:
        window_tokens = window_tokens.at[-1].set(0)

    retrieved = jnp.minimum(shape.retrieved, lengths)
    table, reads = _rows_to_read(next(keys), shape, row, lengths, retrieved, miss_share)
    remaining = sizes[0] - jax.random.randint(next(keys), sizes[0].shape, 0, 3)
    # A mask of what each row of the cache and of the store may be read for.
    store_key, cache_key = next(keys), next(keys)
    store = _rows(store_key, (*row, shape.tokens, 2, shape.head_dim), dtype)
    cache_rows = _rows(cache_key, (*row, shape.slots, 2, shape.head_dim), dtype)
    centroids = normal(*row, shape.cluster_room, shape.head_dim)
    value_means = normal(*row, shape.cluster_room, shape.head_dim)
    scales = 0.05 * (1 + jnp.abs(normal(*row, shape.tokens)))
    sink = normal(*row, shape.sinks, 2, shape.head_dim)
    window = normal(*row, shape.window, 2, shape.head_dim)
    token_ids = _token_ids(next(keys), shape, row, lengths, prompt_tokens)
    if poison:
        tokens, slots, hit = reads
        missed = _mark(shape.tokens, jnp.where(hit, NO_ID, tokens)).at[..., 0].set(True)
        centroids = _keep(centroids, sizes > 0)
        value_means = _keep(value_means, sizes > 0)
        scales = _keep(scales, held)
        token_ids = jnp.where(held, token_ids, 65535)
        store = _keep(store, missed)
        cache_rows = _keep(cache_rows, _mark(shape.slots, jnp.where(hit, slots, NO_ID)))
        sink = _keep(sink, (jnp.arange(shape.sinks) < sink_tokens[:, None])[:, None])
        window = _keep(window, (jnp.arange(shape.window) < window_tokens[:, None])[:, None])
    words = -(-shape.head_dim // 32)
    return StepInputs(
        query=query,
        rotated_query=rotate(query),
        centroids=centroids,
        value_means=value_means.astype(dtype),
        offsets=offsets,
        codes=jax.random.bits(next(keys), (*row, shape.tokens, words), jnp.uint32),
        scales=scales.astype(dtype),
        token_ids=token_ids.astype(jnp.uint16),
        store=store,
        cache_rows=cache_rows,
        table=table,
        sink=sink,
        sink_tokens=sink_tokens,
        window=window,
        window_tokens=window_tokens,
        lengths=lengths,
        prompt_tokens=prompt_tokens,
        candidate_budget=jnp.minimum(shape.candidates, lengths),
        retrieved_budget=retrieved,
        step=jnp.int32(STEP),
        tokens=reads[0],
        slots=reads[1],
        hit=reads[2],
        remaining=jnp.maximum(remaining, 0),
    )


def _normal(key: Array, size: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, size, jnp.float32).astype(dtype)


def _rows(key: Array, size: tuple[int, ...], dtype: Any) -> Array:
    """Normals, made a row at a time: random bits take several times the result's memory."""
    layers, batch, kv_heads, *rest = size
    keys = jax.random.split(key, layers * batch * kv_heads)
    return lax.map(lambda key: _normal(key, tuple(rest), dtype), keys).reshape(size)


def _keep(x: Array, mask: Array) -> Array:
    """`x` where the mask of its leading axes holds, NaN elsewhere."""
    mask = jnp.broadcast_to(mask, x.shape[: max(mask.ndim, 4)])
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, jnp.nan)


def _mark(size: int, places: Array) -> Array:
    """`[batch, kv_heads, n]` places to a mask `[batch, kv_heads, size]` of them."""

    def of_row(places: Array) -> Array:
        return jnp.zeros(size, bool).at[places].set(True, mode="drop")

    return jax.vmap(jax.vmap(of_row))(places)


def _lengths(shape: StepShape, ragged: bool) -> tuple[Array, Array]:
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


def _offsets(key: Array, shape: StepShape, layers: int, lengths: Array) -> Array:
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


def _shuffle(key: Array, groups: Array) -> Array:
    """Lists the places `0 ... n` of the last axis by group, in random order in each."""
    bits = jax.random.bits(key, groups.shape, jnp.uint32)
    place = jnp.broadcast_to(jnp.arange(groups.shape[-1], dtype=jnp.int32), groups.shape)
    return lax.sort((groups, bits, place), num_keys=2)[2]


def _token_ids(
    key: Array, shape: StepShape, row: tuple[int, ...], lengths: Array, prompt_tokens: Array
) -> Array:
    """A random order of each segment's tokens, counted from its start."""
    positions = jnp.broadcast_to(
        jnp.arange(shape.tokens, dtype=jnp.int32), (*row[1:], shape.tokens)
    )
    start = segment_start(positions, prompt_tokens, shape.segment_tokens, shape.growth_tokens)
    start = jnp.where(positions < lengths[:, None, None], start, NO_ID)
    start = jnp.broadcast_to(start, (*row, shape.tokens))
    return jnp.where(start < NO_ID, _shuffle(key, start) - start, 0)


def _rows_to_read(
    key: Array,
    shape: StepShape,
    row: tuple[int, ...],
    lengths: Array,
    retrieved: Array,
    miss_share: float | Array,
) -> tuple[RowTable, tuple[Array, Array, Array]]:
    """A full row cache in every layer, and random rows to read, hits in it and misses.

    The lists hold for every layer: all layers' caches hold the same tokens.
    """
    batch, kv_heads = row[1:]
    slots, room = shape.slots, shape.max_retrieved
    places = jnp.broadcast_to(
        jnp.arange(shape.tokens, dtype=jnp.int32), (batch, kv_heads, shape.tokens)
    )
    order = _shuffle(key, jnp.where(places < lengths[:, None, None], 0, 1))
    # The n-th token of that order lies in a slot that is anywhere: a stride with no factor of
    # `slots` visits every slot once.
    stride = next(p for p in (7919, 6007, 104729, 1) if slots % p) if slots > 1 else 1
    slot = (jnp.arange(slots, dtype=jnp.uint32) * (stride % slots) % slots).astype(jnp.int32)
    cached = jnp.arange(slots) < lengths[:, None, None]
    used = jnp.where(cached, order[..., :slots], EMPTY)
    owner = jnp.zeros((batch, kv_heads, slots), jnp.int32).at[..., slot].set(used)

    def invert(owner: Array) -> Array:
        places = jnp.where(is_held(owner), owner, NO_ID)
        slots_of = jnp.arange(slots, dtype=jnp.int32)
        return jnp.full(shape.tokens, EMPTY, jnp.int32).at[places].set(slots_of, mode="drop")

    last_used = jnp.where(is_held(owner), jax.random.randint(key, owner.shape, 0, STEP), EMPTY)
    slots_of, owners, uses = (
        jnp.broadcast_to(field, (*row, field.shape[-1]))
        for field in (jax.vmap(jax.vmap(invert))(owner), owner, last_used)
    )
    # One counter about to wrap around.
    hits, misses = (jnp.full(row, count, jnp.uint32) for count in (2**32 - 3, 7))
    table = RowTable(slots_of, owners, uses, hits, misses)

    nth = jnp.arange(room, dtype=jnp.int32)
    count = jnp.minimum(retrieved, room)[:, None, None]
    hits = jnp.minimum(count - jnp.ceil(miss_share * count).astype(jnp.int32), slots)
    hit = jnp.broadcast_to(nth < hits, (batch, kv_heads, room))
    # Misses come from beyond the slots, as far as there are tokens beyond them, and displace the
    # slots after the hits'.
    beyond = jnp.where(lengths[:, None, None] >= slots + count - hits, slots, hits)
    place = jnp.where(hit, nth, beyond + nth - hits)
    tokens = jnp.take_along_axis(order, jnp.minimum(place, shape.tokens - 1), axis=-1)
    listed = jnp.where(nth < slots, slot[jnp.minimum(nth, slots - 1)], NO_ID)
    valid = nth < count
    tokens = jnp.where(valid, tokens, NO_ID)
    slots_read = jnp.where(valid, listed, NO_ID)
    # By segments and in random order in each, as a list by position has them; past the last one
    # there is nothing.
    segment = jnp.where(valid, tokens // shape.segment_tokens, NO_ID)
    mixed = _shuffle(key, segment)
    mixed_reads = (
        jnp.take_along_axis(x, mixed, axis=-1) for x in (tokens, slots_read, hit & valid)
    )
    first, second, third = mixed_reads
    return table, (first, second, third)
