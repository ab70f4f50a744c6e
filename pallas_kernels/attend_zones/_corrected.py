"""Calls the kernel of the estimate by moments, `_corrected_program.py`.

It is a launch of its own, after the one that attends to the other zones and admits missed rows: so
no row crosses the bus twice, but for those that found no slot. Both write into the same arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.attend_zones._config import RestConfig
from pallas_kernels.attend_zones._corrected_program import GRANULE, RestProgram
from pallas_kernels.toolbox import launch
from pallas_kernels.types import NO_ID, Estimate, Picks, StoredRows


class RestOperands(NamedTuple):
    """The kernel's operands, in order; None for what is not there.

    Attributes:
        outputs_before, logsumexps_before: as in `ZoneStates`, with room for its own parts, last.
        query: `[batch, kv_heads, group, head_dim]`.
        store, cache: the data of `StoredRows`, missed rows admitted; no row cache is None.
        store_scales, cache_scales: their scales; None for plain rows.
        tokens, slots: as in `Picks`.
        own: `[batch, kv_heads, granules * GRANULE]` int32: the clusters of the retrieved rows,
            rising; -1 for none, of which there may be any between.
        tops: `[batch, kv_heads, granules]` int32, the greatest of each granule.
        logits, value_means, offsets, remaining: as in `Estimate`.
        products: as in `Correction`.
        lambdas, weights, weight_scales: of its moments.
        layer: int32 scalar.
    """

    outputs_before: Any
    logsumexps_before: Any
    query: Any
    store: Any
    cache: Any
    store_scales: Any
    cache_scales: Any
    tokens: Any
    slots: Any
    own: Any
    tops: Any
    logits: Any
    value_means: Any
    offsets: Any
    remaining: Any
    products: Any
    lambdas: Any
    weights: Any
    weight_scales: Any
    layer: Any


class RestResults(NamedTuple):
    """The kernel's results, in order: in place of `outputs_before` and `logsumexps_before`."""

    outputs: Any
    logsumexps: Any


def attend_corrected(
    outputs: Array,
    logsumexps: Array,
    query: Array,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
    config: RestConfig,
    interpret: bool,
) -> tuple[Array, Array]:
    """Attend to what remains of the clusters, corrected by moments.

    Args:
        outputs, logsumexps: as in `ZoneStates`, with room for `config.splits` more parts at their
            end, which are written in place.
        query, picks, estimate, layer, scale: as for `attend_zones`.
        rows: with the missed rows admitted.
        config: how the work is cut.
        interpret: see `launch.call`.

    Returns:
        outputs and logsumexps of all parts.
    """
    correction = estimate.correction
    assert correction is not None
    batch, kv_heads = query.shape[:2]
    own = jnp.where(picks.tokens != NO_ID, correction.clusters, -1)
    room = GRANULE * pl.cdiv(own.shape[2], GRANULE)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, room - own.shape[2])), constant_values=-1)
    tops = jnp.max(own.reshape(batch, kv_heads, -1, GRANULE), axis=-1)
    cached = rows.cache.data.size > 0
    moments = correction.moments
    operands = RestOperands(
        *(outputs, logsumexps, query),
        *(rows.store.data, rows.cache.data if cached else None),
        *(rows.store.scales, rows.cache.scales if cached else None),
        *(picks.tokens, picks.slots if cached else None, own, tops),
        *estimate[:4],
        *(correction.products, moments.lambdas, moments.weights, moments.weight_scales),
        launch.scalar(layer),
    )
    kept = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (outputs, logsumexps))

    def kernel(operands: RestOperands, results: RestResults) -> None:
        RestProgram(operands, results, config, scale).run()

    [found] = launch.call(
        kernel,
        (operands,),
        (RestResults(*kept),),
        (config.splits * batch * kv_heads,),
        name="attend_corrected",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aliases={0: 0, 1: 1},
        interpret=interpret,
    )
    return found.outputs, found.logsumexps
