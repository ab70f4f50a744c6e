"""The op `attend_zones`. Its meaning is `reference.py`; `triton.py` and `tpu.py` are kernels."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attend_zones import reference, tpu, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import Estimate, Picks, SteadyRows, StoredRows, ZoneStates


def attend_zones(
    query: Float[Array, "batch kv_heads group head_dim"],
    steady: SteadyRows,
    rows: StoredRows,
    picks: Picks,
    estimate: Estimate,
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> ZoneStates:
    """Attend to the three zones (RetroInfer, section 4.2, tripartite attention).

    - steady: its rows, exactly;
    - retrieved: hits from the row cache, misses from the store, exactly. Misses that have a slot
      are written into it;
    - estimated: cluster j counts `remaining[j]` times exp(logit), with its members' mean value.
      For a cluster of which nothing is retrieved that is at most the members' true mass, by
      Jensen's inequality (equation 3 there). For a partly retrieved one it may be more: the logit
      is that of all members' mean, and the best ones of them are gone.

    With an estimate's `correction` the third zone is that of `_rest.attend_rest`: what is retrieved
    leaves its cluster's mean key and mean value too, and moments correct mass and value to second
    order in the residuals. Masses stay positive whatever the query. If the correction has a spread,
    the result has bounds: between which numbers each query head's estimated mass lies, and how far
    the merged output may be from full attention's.

    With an estimate's `pooled` the third zone is that of `_pooled.attend_pooled`: to second order
    too, by what all clusters of a head have in common. No row is read for it.

    NaN or infinity in what a query attends to makes its outputs NaN, or its logsumexps.

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        steady: the steady zone.
        rows: the store and the row cache, of one format: scaled rows stand for the numbers that
            `rounding.dequantise` gives. Without slots the kernel wants the store on the device.
        picks: from `select_tokens`.
        estimate: what is left to the clusters.
        layer: which layer of the stacks.
        scale: as in `score_clusters`.
        implementation: see `pallas_kernels.dispatch.call`.

    Raises:
        NotImplementedError: rows of two formats; or what `pallas_kernels.dispatch.call` raises.
        ValueError: the estimate has two corrections.
    """
    if estimate.correction is not None and estimate.pooled is not None:
        raise ValueError("an estimate has `correction` or `pooled`, not both")
    return dispatch.call(
        "attend_zones",
        implementation,
        {
            "xla": reference.attend_zones,
            "triton": triton.attend_zones,
            "tpu": tpu.attend_zones,
        },
        query,
        steady,
        rows,
        picks,
        estimate,
        layer,
        scale=scale,
    )
