"""The semantics of `attend_zones`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import _compat
from pallas_kernels.attend_zones._bounds import zone_bounds
from pallas_kernels.attend_zones._pooled import attend_pooled
from pallas_kernels.attend_zones._rest import attend_rest, what_remains
from pallas_kernels.numerics import is_masked, log_count, log_sum_exp
from pallas_kernels.rounding import dequantise
from pallas_kernels.rows import check_formats
from pallas_kernels.types import (
    MASKED,
    NO_ID,
    Estimate,
    Picks,
    Rows,
    SteadyRows,
    StoredRows,
    ZoneStates,
)


def read_stored(store: Rows, layer: Array | int, tokens: Array) -> Rows:
    """Read rows of the store, on the device: `[batch, kv_heads, n, ...]`, in the store's format."""
    return jax.tree.map(lambda array: read_rows(array, layer, tokens), store)


def read_rows(store: Array, layer: Array | int, tokens: Array) -> Array:
    """Read of an array `[layers, batch, kv_heads, tokens, ...]`: `[batch, kv_heads, n, ...]`.

    A store in host memory is read by the host's processor, since XLA does not gather across
    memories; the rows it gathered then go to the device in one transfer.
    """
    batch, kv_heads = tokens.shape[:2]
    parts = (
        jnp.asarray(layer),
        jnp.arange(batch)[:, None, None],
        jnp.arange(kv_heads)[None, :, None],
        jnp.minimum(tokens, store.shape[3] - 1),
    )
    index = jnp.stack(jnp.broadcast_arrays(*parts), axis=-1).astype(jnp.int32)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(3, store.ndim - 1)),
        collapsed_slice_dims=(0, 1, 2, 3),
        start_index_map=(0, 1, 2, 3),
    )

    def gather(store: Array, index: Array) -> Array:
        return lax.gather(
            store,
            index,
            numbers,
            (1, 1, 1, 1, *store.shape[4:]),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    if jax.typeof(store).memory_space != jax.memory.Space.Host:
        return gather(store, index)
    index = jax.device_put(index, jax.memory.Space.Host)
    rows = _compat.run_on_host(gather, store, index)
    return jax.device_put(rows, jax.memory.Space.Device)


def attend_rows(query: Array, rows: Array, valid: Array, *, scale: float) -> tuple[Array, Array]:
    """Attend to rows of keys and values, exactly.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        rows: `[batch, kv_heads, n, 2, head_dim]`.
        valid: `[batch, kv_heads or 1, n]` bool.
        scale: multiplies every product of query and key.
    """
    # A row that is not valid may hold anything, NaN included.
    rows = jnp.where(valid[..., None, None], rows, 0).reshape(*rows.shape[:3], -1)
    # Multiplied as they lie, a key beside its value: XLA for CPUs would gather the rows again for
    # each operand that it cuts out of them, number by number.
    head_dim = query.shape[-1]
    beside_nothing = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    logits = scale * jnp.einsum(
        "bhgd,bhnd->bhgn", beside_nothing, rows, preferred_element_type=jnp.float32
    )
    output, logsumexp = attend_logits(jnp.where(valid[:, :, None, :], logits, MASKED), rows)
    return output[..., head_dim:], logsumexp


def attend_logits(logits: Array, values: Array) -> tuple[Array, Array]:
    """Softmax of the logits `[batch, kv_heads, group, n]` over values `[batch, kv_heads, n, d]`."""
    logsumexp = log_sum_exp(logits, axis=-1)
    weights = jnp.where(is_masked(logits), 0.0, jnp.exp(logits - logsumexp[..., None]))
    return jnp.einsum("bhgn,bhnd->bhgd", weights, values.astype(jnp.float32)), logsumexp


def attend_zones(
    query: Array,
    steady: SteadyRows,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
) -> ZoneStates:
    """See `pallas_kernels.attend_zones`."""
    batch, kv_heads = query.shape[:2]
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    sink, sink_tokens, window, window_tokens = steady
    store, cache = rows
    check_formats("attend_zones", rows)
    tokens, slots, hit = picks
    correction = estimate.correction

    steady_rows = jnp.concatenate([sink[layer], window[layer]], axis=2)
    steady_valid = jnp.concatenate(
        [
            jnp.arange(sink.shape[3]) < sink_tokens[:, None],
            jnp.arange(window.shape[3]) < window_tokens[:, None],
        ],
        axis=1,
    )
    of_steady = attend_rows(query, steady_rows, steady_valid[:, None, :], scale=scale)

    read = missed = read_stored(store, layer, jnp.where(hit, 0, tokens))
    if cache.shape[3]:
        cache = admit(cache, missed, layer, jnp.where(hit, NO_ID, slots))
        # Read after the admission: reading before it would make XLA copy the whole cache.
        at = jnp.minimum(slots, cache.shape[3] - 1)
        has_slot = slots != NO_ID

        def from_cache(cached: Array, missed: Array) -> Array:
            chosen = has_slot[(..., *(None,) * (missed.ndim - 3))]
            return jnp.where(chosen, cached[layer, b, h, at], missed)

        read = jax.tree.map(from_cache, cache, missed)
    # Exactly the numbers that were rounded to, so that float rows of them give the same.
    numbers = dequantise(read)
    retrieved = attend_rows(query, numbers, tokens != NO_ID, scale=scale)

    if correction is None:
        rest, estimated = None, attend_clusters(estimate, layer)
        if estimate.pooled is not None:
            estimated = attend_pooled(query, estimate, layer, scale=scale)
    else:
        rest = what_remains(query, numbers, tokens != NO_ID, estimate, layer, scale=scale)
        estimated = attend_rest(rest, correction, layer)

    parts = (of_steady, retrieved, estimated)
    outputs = jnp.stack([output for output, _ in parts])
    logsumexps = jnp.stack([logsumexp for _, logsumexp in parts])
    zones = ZoneStates(outputs, logsumexps, cache)
    if correction is not None or estimate.pooled is not None:
        zones = zones._replace(estimated=jnp.array([False, False, True]))
    if rest is None or correction is None or correction.spread is None:
        return zones
    given = query, numbers, tokens != NO_ID, rest, estimate
    certain = zone_bounds(*given, (outputs, logsumexps), layer, scale=scale)
    return zones._replace(bounds=certain)


def admit(cache: Rows, rows: Rows, layer: Array | int, slots: Array) -> Rows:
    """Write rows into slots `[batch, kv_heads, n]` of a layer of the row cache; NO_ID for none."""
    batch, kv_heads = slots.shape[:2]
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    return jax.tree.map(
        lambda held, new: held.at[layer, b, h, slots].set(new, mode="drop"), cache, rows
    )


def attend_clusters(estimate: Estimate, layer: Array | int) -> tuple[Array, Array]:
    """Attends to what remains of the clusters by their means alone."""
    logits, value_means, offsets, remaining, *_ = estimate
    remaining = jnp.minimum(remaining, jnp.diff(offsets[layer], axis=-1))
    # A cluster without any may hold anything, NaN included.
    means = jnp.where((remaining > 0)[..., None], value_means[layer], 0)
    kept = log_count(remaining)[:, :, None, :]
    return attend_logits(jnp.where(is_masked(kept), MASKED, logits + kept), means)
