"""Random but realistic inputs of a decode step, for tests and benchmarks."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.encode_tokens import rotate
from pallas_kernels.shapes import StepShape
from pallas_kernels.testing._index import lengths_of, offsets_of, token_ids_of
from pallas_kernels.testing._reads import STEP, rows_to_read
from pallas_kernels.types import NO_ID, RowTable

# With unit normals for keys the logits then have this standard deviation: a softmax's tail as
# trained models have it.
QUERY_SIZE = 2.5


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
    """Make a step's inputs on the device, in one program.

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
    """Make the same inputs with other rows cached and other rows to read, nothing poisoned."""
    key = jax.random.key(seed, impl="unsafe_rbg")
    row = inputs.table.token_of_slot.shape[:3]
    count = inputs.retrieved_budget
    table, reads = rows_to_read(key, shape, row, inputs.lengths, count, miss_share)
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

    lengths, prompt_tokens = lengths_of(shape, ragged)
    offsets = offsets_of(next(keys), shape, layers, lengths)
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
    table, reads = rows_to_read(next(keys), shape, row, lengths, retrieved, miss_share)
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
    token_ids = token_ids_of(next(keys), shape, row, lengths, prompt_tokens)
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


def _normal(key: Array, size: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.normal(key, size, jnp.float32).astype(dtype)


def _rows(key: Array, size: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw normals, a row at a time: random bits take several times the result's memory."""
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
