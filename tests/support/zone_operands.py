"""The operands of `attend_zones` from arrays by name."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.types import Estimate, Picks, Rows, SteadyRows, StoredRows


def zone_operands(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The operands but for the layer: the query and the groups.

    Args:
        arrays: by the names of the groups' fields, and `query`; `cache_rows` are the row cache's.
            Stored rows are plain, but with `store_scales` and `cache_scales`.
    """
    stored = StoredRows(
        Rows(arrays["store"], arrays.get("store_scales")),
        Rows(arrays["cache_rows"], arrays.get("cache_scales")),
    )
    steady, picks, estimate = (
        group(**{name: arrays[name] for name in group._fields if name in arrays})
        for group in (SteadyRows, Picks, Estimate)
    )
    return arrays["query"], steady, stored, picks, estimate
