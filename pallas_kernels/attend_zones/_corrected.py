"""Calls the kernels of the estimate by moments: `_runs.py`, `_remains.py`, `_corrected_program.py`.

They are launches of their own, after the one that attends to the other zones and admits missed
rows. So no row crosses the bus twice, but for the values of those that found no slot. That launch
keeps the logits of retrieved rows, so keys are read once. All write into the same outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.attend_zones._config import RestConfig
from pallas_kernels.attend_zones._corrected_program import RestProgram
from pallas_kernels.attend_zones._remains import Remains, RemainsOperands, RemainsProgram
from pallas_kernels.attend_zones._runs import BLOCK, Runs, RunsOperands, find_runs
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.head_calls import HeadCalls
from pallas_kernels.types import Estimate, Picks, StoredRows


class RestOperands(NamedTuple):
    """The last kernel's operands, in order; None for what is not there.

    Attributes:
        outputs_before, logsumexps_before: as in `ZoneStates`, with room for its own parts, last.
        query: `[batch, kv_heads, group, head_dim]`; its shape alone is used.
        store, cache: the data of `StoredRows`, missed rows admitted; no row cache is None.
        store_scales, cache_scales: their scales; None for plain rows.
        tokens, slots: as in `Picks`.
        own: `clusters` of `Correction`.
        means, vectors, each, peaks, masses, ends: as in `Remains`.
        value_means: as in `Estimate`.
        weights: of the moments.
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
    means: Any
    vectors: Any
    each: Any
    peaks: Any
    masses: Any
    ends: Any
    value_means: Any
    weights: Any
    layer: Any


class RestResults(NamedTuple):
    """The last kernel's results, in place of `outputs_before` and `logsumexps_before`."""

    outputs: Any
    logsumexps: Any


def attend_corrected(
    outputs: Array,
    logsumexps: Array,
    exponents: Array,
    query: Array,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Array | int,
    *,
    config: RestConfig,
    interpret: bool,
) -> tuple[Array, Array]:
    """Attend to what remains of the clusters, corrected by moments.

    Args:
        outputs, logsumexps: as in `ZoneStates`, with room for `config.splits` more parts at their
            end, which are written in place.
        exponents: `[batch, kv_heads, group, retrieved]`, see `RemainsOperands`.
        query, picks, estimate, layer: as for `attend_zones`.
        rows: with the missed rows admitted.
        config: how the work is cut.
        interpret: see `launch.call`.

    Returns:
        outputs and logsumexps of all parts.
    """
    correction = estimate.correction
    assert correction is not None
    layer = launch.scalar(layer)
    remains = _find_remains(query, exponents, picks, estimate, layer, config, interpret)
    batch, kv_heads, group = query.shape[:3]
    programs = config.splits * batch * kv_heads * pl.cdiv(group, config.heads)
    cached = rows.cache.data.size > 0
    operands = RestOperands(
        *(outputs, logsumexps, query),
        *(rows.store.data, rows.cache.data if cached else None),
        *(rows.store.scales, rows.cache.scales if cached else None),
        *(picks.tokens, picks.slots if cached else None, correction.clusters),
        *remains,
        *(estimate.value_means, correction.moments.weights, layer),
    )
    kept = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (outputs, logsumexps))

    def kernel(operands: RestOperands, results: RestResults) -> None:
        RestProgram(operands, results, config).run()

    [found] = launch.call(
        kernel,
        (operands,),
        (RestResults(*kept),),
        (programs,),
        name="attend_corrected",
        num_warps=config.num_warps,
        num_stages=1,
        aliases={0: 0, 1: 1},
        interpret=interpret,
    )
    return found.outputs, found.logsumexps


def _find_remains(
    query: Array,
    exponents: Array,
    picks: Picks,
    estimate: Estimate,
    layer: Array,
    config: RestConfig,
    interpret: bool,
) -> Remains:
    """Find the runs of the list, and with them what remains of each cluster."""
    logits, _, offsets, remaining, correction, _ = estimate
    assert correction is not None
    moments, (batch, kv_heads, group, clusters) = correction.moments, logits.shape
    rows = HeadCalls((batch, kv_heads), interpret)
    floats = functools.partial(rows.of, dtype=jnp.float32)
    listed = RunsOperands(picks.tokens, correction.clusters)
    [runs] = rows.call(
        find_runs,
        (listed,),
        (Runs(rows.of(clusters), rows.of()),),
        pl.cdiv(picks.tokens.shape[2], BLOCK),
        name="find_runs",
        num_warps=BLOCK // 64,
    )
    operands = RemainsOperands(
        *(query, exponents, *listed),
        *(runs.begins, runs.end, logits, offsets, remaining),
        *(correction.products, moments.lambdas, moments.weight_scales, layer),
    )
    tiles, rank = pl.cdiv(clusters, config.remains_tile), moments.lambdas.shape[4]
    results = Remains(
        floats(group, clusters),
        jax.ShapeDtypeStruct((rank, *logits.shape), jnp.float32),
        floats(clusters),
        *(floats(group, tiles), floats(group, tiles), rows.of(tiles)),
    )

    def kernel(operands: RemainsOperands, results: Remains) -> None:
        RemainsProgram(operands, results, config).run()

    [found] = launch.call(
        kernel,
        (operands,),
        (results,),
        (tiles * batch * kv_heads,),
        name="find_remains",
        num_warps=config.remains_warps,
        num_stages=1,
        interpret=interpret,
    )
    remains: Remains = found
    return remains
