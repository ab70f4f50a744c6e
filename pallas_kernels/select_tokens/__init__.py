"""The op `select_tokens`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.select_tokens import reference, triton
from pallas_kernels.select_tokens.reference import empty_table as empty_table
from pallas_kernels.select_tokens.reference import segment_start as segment_start
from pallas_kernels.types import Candidates, IndexedTokens, Retrieved, RowTable


def select_tokens(
    log_mass: Float[Array, "batch kv_heads candidates"],
    candidates: Candidates,
    budget: Int[Array, " batch"] | Int[Array, "batch kv_heads"],
    indexed: IndexedTokens,
    table: RowTable,
    layer: Int[Array, ""] | int,
    step: Int[Array, ""],
    *,
    max_tokens: int,
    segment_tokens: int,
    growth_tokens: int,
    admission_ratio: float = 1.0,
    with_clusters: bool = False,
    implementation: Implementation | None = None,
) -> Retrieved:
    """Select the tokens of most group mass and find, or make, their slots in the row cache.

    The selection is exact, ties to the lower index position. Slots of rows not needed in this step
    are given to missed rows, the least recently used first; a missed row that finds none is read
    from the store and not kept.

    With an `admission_ratio` above 1 rows have to be worth reading from the store. One that is not
    in the cache is retrieved only if its mass is at least so many times that of the least row
    selected. The others are left to be estimated: they are in `remaining`, and are neither hits nor
    misses. This holds once a head of the table has missed as often as it has slots. Until then its
    cache fills with all that is selected. See docs/lab/host-rows.md for what it gains.

    Args:
        log_mass: from `score_tokens`.
        candidates: from `select_clusters`.
        budget: tokens wanted, for each sequence, or each of its kv heads; at most `max_tokens`.
        indexed: the token at each index position.
        table: the row table, updated at `layer`; one without slots where there is no row cache.
        layer: which layer of the stacks.
        step: this step's number, greater than all before it.
        max_tokens: length of the result's lists.
        segment_tokens, growth_tokens: length of a prompt's segments and of those of growth.
        admission_ratio: 1 or more; 1 retrieves all that is selected. Of no effect without slots.
        with_clusters: list the cluster of each selected token too, as `attend_zones` wants them
            with moments.
        implementation: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "select_tokens",
        implementation,
        {"xla": reference.select_tokens, "triton": triton.select_tokens},
        log_mass,
        candidates,
        budget,
        indexed,
        table,
        layer,
        step,
        max_tokens=max_tokens,
        segment_tokens=segment_tokens,
        growth_tokens=growth_tokens,
        admission_ratio=admission_ratio,
        with_clusters=with_clusters,
    )
