"""All ops of a decode step in one program, as `op_cases` has each by itself."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from op_cases import OpCase, StepBench, anew, copied, indexed_of, steady_of

from pallas_kernels.testing import StepInputs
from pallas_kernels.testing.pooled import PooledInputs, make_pooled
from pallas_kernels.types import (
    Estimate,
    Picks,
    Pooled,
    RankedTokens,
    Rows,
    StoredRows,
    TokenCodes,
)

STEPS = ("step", "step-pooled")


def step_case(bench: StepBench, *, pooled: bool = False) -> OpCase:
    """All ops as the engine's decode step calls them in a layer; same query every time.

    So from the second time round the layers every retrieved row is a hit.

    Args:
        bench: of the shape.
        pooled: with a pooled covariance.
    """
    shape, run = bench.shape, bench.run
    more = make_pooled(bench.inputs, 0) if pooled else None

    def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
        x: StepInputs = operands[0]
        more: PooledInputs | None = operands[1]
        table, cache_rows = state
        query = anew(x.query, layer)
        scores = run(
            *("score_clusters", query, x.centroids, x.offsets, layer),
            scale=shape.scale,
            rotated=True,
            covariance=None if more is None else more.covariance,
        )
        chosen = run(
            *("select_clusters", *scores[:2], x.offsets, layer, x.candidate_budget),
            max_candidates=shape.max_candidates,
        )
        log_mass = run(
            *("score_tokens", scores, chosen, x.offsets, TokenCodes(x.codes, x.scales), layer),
            scale=shape.scale,
            max_candidates=shape.max_candidates,
        )
        retrieved = run(
            *("select_tokens", RankedTokens(log_mass, chosen, x.retrieved_budget)),
            *(indexed_of(x), table, layer, x.step),
            settings=shape.selection,
        )
        zones = run(
            "attend_zones",
            *(query, steady_of(x), StoredRows(Rows(x.store), Rows(cache_rows))),
            Picks(*retrieved[:3]),
            Estimate(
                *(scores[0], x.value_means, x.offsets, retrieved.remaining),
                pooled=None if more is None else Pooled(scores.pooled, more.deviations),
            ),
            layer,
            scale=shape.scale,
        )
        output, _ = run("merge_states", zones.outputs, zones.logsumexps, dtype=query.dtype)
        counts = (retrieved.hits, retrieved.misses)
        return (output, *counts), (retrieved.table, zones.cache_rows.data)

    x = bench.inputs
    moved = bench.case("score_clusters").bytes + bench.zone_bytes()
    moved += shape.rows * shape.candidates * (4 * x.codes.shape[-1] + x.scales.dtype.itemsize)
    if more is not None:
        moved += sum(array.nbytes / array.shape[0] for array in more)
    state = (copied(x.table), jnp.copy(x.cache_rows))
    return OpCase(call, (x, more), bench.links, moved, state)
