"""The op `select_tokens`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.select_tokens import reference, triton
from pallas_kernels.select_tokens.reference import empty_table as empty_table
from pallas_kernels.select_tokens.reference import segment_start as segment_start
from pallas_kernels.types import (
    IndexedTokens,
    RankedTokens,
    Retrieved,
    RowTable,
    SelectionSettings,
)


def select_tokens(
    ranked: RankedTokens,
    indexed: IndexedTokens,
    table: RowTable,
    layer: Int[Array, ""] | int,
    step: Int[Array, ""],
    *,
    settings: SelectionSettings,
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
        ranked: the candidates, their masses, and how many tokens are wanted.
        indexed: the token at each index position.
        table: the row table, updated at `layer`; one without slots where there is no row cache.
        layer: int32, which layer of the stacks.
        step: int32, this step's number, greater than all before it.
        settings: lengths of the lists and of the segments, and the `admission_ratio`.
        implementation: see `pallas_kernels.dispatch.call`.

    Raises:
        NotImplementedError: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "select_tokens",
        implementation,
        {"xla": reference.select_tokens, "triton": triton.select_tokens},
        ranked,
        indexed,
        table,
        layer,
        step,
        settings=settings,
    )
