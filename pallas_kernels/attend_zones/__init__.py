"""The op `attend_zones`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attend_zones import reference, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import ZoneStates


def attend_zones(
    query: Float[Array, "batch kv_heads group head_dim"],
    sink: Float[Array, "layers batch kv_heads sinks 2 head_dim"],
    sink_tokens: Int[Array, " batch"],
    window: Float[Array, "layers batch kv_heads window 2 head_dim"],
    window_tokens: Int[Array, " batch"],
    store: Float[Array, "layers batch kv_heads tokens 2 head_dim"],
    cache_rows: Float[Array, "layers batch kv_heads slots 2 head_dim"],
    tokens: Int[Array, "batch kv_heads retrieved"],
    slots: Int[Array, "batch kv_heads retrieved"],
    hit: Bool[Array, "batch kv_heads retrieved"],
    logits: Float[Array, "batch kv_heads group clusters"],
    value_means: Float[Array, "layers batch kv_heads clusters head_dim"],
    offsets: Int[Array, "layers batch kv_heads clusters+1"],
    remaining: Int[Array, "batch kv_heads clusters"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> ZoneStates:
    """Attends to the three zones (RetroInfer, section 4.2, tripartite attention).

    - steady: the rows of `sink` and `window`, exactly;
    - retrieved: hits from the row cache, misses from the store, exactly; misses that have a slot
      are written into it;
    - estimated: cluster j counts `remaining[j]` times exp(logit), with its members' mean value.
      Of a cluster of which nothing is retrieved that is, by Jensen's inequality, at most the
      members' true mass (equation 3 there). Of what is left of a partly retrieved one it is not:
      the logit is that of all members' mean, and the best ones of them are gone.

    NaN or infinity in what a query attends to makes its outputs NaN, or its logsumexps.

    Args:
        query: one decode step's queries, grouped by the kv head that they share.
        sink, sink_tokens: the first tokens' rows, and how many of them there are.
        window, window_tokens: the rows not in the index, oldest first, and how many. Of both, all
            for more than there are.
        store: all indexed rows in token order; may lie in `pinned_host` memory.
        cache_rows: the rows in the row cache's slots. No slots: all rows are read from the store,
            which the kernel wants on the device then.
        tokens, slots, hit: from `select_tokens`.
        logits: from `score_clusters`.
        value_means: means of the members' values. Anything for clusters past the last one of which
            something is to be estimated; of those before it NaN may show, whatever is estimated.
        offsets: as in `score_clusters`: they give the clusters' sizes.
        remaining: the members of each cluster to estimate: what `select_tokens` leaves, or zero
            for a cluster to leave out. More than it has members are all of them.
        layer: which layer of the stacks.
        scale: as in `score_clusters`.
    """
    return dispatch.call(
        "attend_zones",
        implementation,
        {"xla": reference.attend_zones, "triton": triton.attend_zones},
        query,
        sink,
        sink_tokens,
        window,
        window_tokens,
        store,
        cache_rows,
        tokens,
        slots,
        hit,
        logits,
        value_means,
        offsets,
        remaining,
        layer,
        scale=scale,
    )
