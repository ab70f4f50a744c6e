"""`attend_zones` as one Pallas (Triton) kernel: all three zones in one launch.

An estimate by moments is three more: see `_corrected.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import backend, tuning
from pallas_kernels.attend_zones._config import Config, RestConfig, heuristic, rest_heuristic
from pallas_kernels.attend_zones._corrected import attend_corrected
from pallas_kernels.attend_zones._program import Operands, Results, aliases
from pallas_kernels.attend_zones._roles import by_processor
from pallas_kernels.attend_zones._zones import Program
from pallas_kernels.rows import check_formats
from pallas_kernels.toolbox import launch
from pallas_kernels.types import Estimate, Picks, Rows, SteadyRows, StoredRows, ZoneStates

__all__ = ["Config", "RestConfig", "attend_zones", "heuristic", "rest_heuristic"]


@backend.per_platform
def attend_zones(
    query: Array,
    steady: SteadyRows,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> ZoneStates:
    """See `pallas_kernels.attend_zones`.

    Each part is one program's share of one zone: first the parts of the missed rows, then of the
    hits, the estimated and the steady zone. Which program takes which matters where missed rows
    come from host memory: see `_roles`. Without a row cache the store's rows are read as hits are.

    Raises:
        NotImplementedError: see `launch.check_heads`; or rows of several dtypes, scaled rows with
            a query in float16, no room for retrieved rows, clusters or the window, or no row cache
            before a store on the host; or a correction with a spread.
    """
    batch, kv_heads, group, head_dim = query.shape
    sink, sink_tokens, window, window_tokens = steady
    check_formats("attend_zones", rows)
    (store, store_scales), (cache_rows, cache_scales) = rows
    tokens, slots, hit = picks
    logits, value_means, offsets, remaining, correction, pooled = estimate
    if correction is not None:
        if correction.spread is not None:
            raise NotImplementedError("attend_zones: there is no kernel for bounds yet")
        launch.check_vectors("attend_zones", "weights of moments", correction.moments.weights)
    by_name = {"sink": sink, "window": window, "store": store, "cache": cache_rows}
    scaled = store_scales is not None
    for name, array in by_name.items():
        levels = scaled and name in ("store", "cache")
        if array.dtype != (jnp.int8 if levels else query.dtype):
            raise NotImplementedError(
                f"attend_zones: {name} is {array.dtype}, query {query.dtype}; the kernel wants "
                "one dtype, and int8 where rows have scales"
            )
    if scaled and query.dtype == jnp.float16:
        raise NotImplementedError(
            "attend_zones: rows have scales and query is float16, which does not hold weights "
            "times scales; the kernel wants bfloat16 or float32"
        )
    launch.check_heads("attend_zones", group, head_dim, query.dtype, value_means.dtype)
    cached = cache_rows.size > 0
    if not cached and jax.typeof(store).memory_space == jax.memory.Space.Host:
        raise NotImplementedError(
            "attend_zones: a store in host memory without a row cache; the kernel wants a slot"
        )
    rooms = {"window": window, "store": store, "tokens": tokens, "remaining": remaining}
    for name, array in rooms.items():
        if not array.size:
            raise NotImplementedError(f"attend_zones: {name} is empty: {array.shape}")
    shape = batch * kv_heads, head_dim, query.dtype.itemsize
    if config is None:
        retrieved, clusters, room = tokens.shape[2], remaining.shape[2], window.shape[3]
        # Clusters that are estimated by moments are another launch's.
        clusters = clusters if correction is None else 0
        config = tuning.config(
            "attend_zones",
            heuristic(*shape, retrieved, clusters, room),
            rows=batch * kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=query.dtype.name,
            retrieved=retrieved,
            clusters=clusters,
            window=room,
        )
    if not cached:
        config = dataclasses.replace(config, missed_splits=0)
    rest_config, rest_parts = None, 0
    if correction is not None:
        rest_config = config.rest or rest_heuristic(shape[0], group, head_dim, remaining.shape[2])
        rest_parts = rest_config.splits
        config = dataclasses.replace(config, estimated_splits=0)
    parts = sum(config.splits)
    missed = config.missed_splits * batch * kv_heads
    choosing = cached and by_processor(store, missed)

    with_sink = sink.size > 0
    operands = Operands(
        query,
        sink if with_sink else window,  # an operand cannot be empty
        sink_tokens,
        window,
        window_tokens,
        store,
        cache_rows if cached else None,
        tokens,
        slots,
        hit,
        logits,
        value_means,
        offsets,
        remaining,
        launch.scalar(layer),
        jnp.zeros(missed + 1, jnp.int32) if choosing else None,
        store_scales,
        cache_scales if cached else None,
        None if pooled is None else pooled.products,
        None if pooled is None else pooled.deviations,
    )
    results = Results(
        jax.ShapeDtypeStruct((parts + rest_parts, *query.shape), jnp.float32),
        jax.ShapeDtypeStruct((parts + rest_parts, *query.shape[:3]), jnp.float32),
    )
    if cached:
        kept = jax.ShapeDtypeStruct(cache_rows.shape, cache_rows.dtype)
        scratch = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        results = results._replace(cache=kept, missed_tokens=scratch, missed_slots=scratch)
        if cache_scales is not None:
            its = jax.ShapeDtypeStruct(cache_scales.shape, cache_scales.dtype)
            results = results._replace(cache_scales=its)
    if choosing:
        results = results._replace(claims=jax.ShapeDtypeStruct((missed + 1,), jnp.int32))
    if correction is not None:
        kept = jax.ShapeDtypeStruct((batch, kv_heads, group, tokens.shape[2]), jnp.float32)
        results = results._replace(exponents=kept, missed_places=results.missed_tokens)

    def kernel(operands: Operands, results: Results) -> None:
        Program(operands, results, config, scale, with_sink, interpret).run()

    [found] = launch.call(
        kernel,
        (operands,),
        (results,),
        (parts * batch * kv_heads,),
        name="attend_zones",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aliases=aliases(operands, results),
        interpret=interpret,
    )
    cache = Rows(found.cache, found.cache_scales) if cached else rows.cache
    if rest_config is None:
        if pooled is None:
            return ZoneStates(found.outputs, found.logsumexps, cache)
        part = jnp.arange(parts) - config.missed_splits - config.hit_splits
        estimated = (part >= 0) & (part < config.estimated_splits)
        return ZoneStates(found.outputs, found.logsumexps, cache, estimated=estimated)
    outputs, logsumexps = attend_corrected(
        *(found.outputs, found.logsumexps, found.exponents, query, rows._replace(cache=cache)),
        *(picks, estimate, layer),
        config=rest_config,
        interpret=interpret,
    )
    estimated = jnp.arange(parts + rest_parts) >= parts
    return ZoneStates(outputs, logsumexps, cache, estimated=estimated)
