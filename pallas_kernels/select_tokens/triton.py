"""`select_tokens` as Triton kernels: by one program a row, or by several."""

from typing import Any

from jax import Array

from pallas_kernels import _tuning
from pallas_kernels.select_clusters.reference import Candidates
from pallas_kernels.select_tokens._split_rows import SplitRows, select_in_split_rows, split_rows
from pallas_kernels.select_tokens._whole_rows import WholeRows, select_in_whole_rows, whole_rows
from pallas_kernels.select_tokens.reference import Retrieved, RowTable, row_budgets

Config = WholeRows | SplitRows

# Up to so many candidates one program a row is faster, even where rows are few: 33,000 take it
# 20 us in 8 rows and 30 in 64, several programs 24 and 43; 262,000 in 8 rows 116 (an H100).
MOST_FOR_ONE_PROGRAM = 2**16


def heuristic(rows: int, candidates: int, max_tokens: int) -> Config:
    """A config for shapes that were not tuned."""
    if candidates <= MOST_FOR_ONE_PROGRAM:
        return whole_rows(candidates, max_tokens)
    return split_rows(rows, candidates, max_tokens)


def select_tokens(
    log_mass: Array,
    candidates: Candidates,
    budget: Array,
    offsets: Array,
    token_ids: Array,
    prompt_tokens: Array,
    table: RowTable,
    layer: Array | int,
    step: Array,
    *,
    max_tokens: int,
    segment_tokens: int,
    growth_tokens: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Retrieved:
    """See `pallas_kernels.select_tokens`."""
    batch, kv_heads, room = log_mass.shape
    config = config or _tuning.config(
        "select_tokens",
        heuristic(batch * kv_heads, room, max_tokens),
        rows=batch * kv_heads,
        candidates=room,
        max_tokens=max_tokens,
    )
    budget = row_budgets(budget, kv_heads)
    operands = (log_mass, candidates, budget, offsets, token_ids, prompt_tokens, table, layer, step)
    how: dict[str, Any] = {
        "max_tokens": max_tokens,
        "segment_tokens": segment_tokens,
        "growth_tokens": growth_tokens,
        "interpret": interpret,
    }
    if isinstance(config, SplitRows):
        return select_in_split_rows(*operands, **how, config=config)
    return select_in_whole_rows(*operands, **how, config=config)
