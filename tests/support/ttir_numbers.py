"""Integers and conversions as a GPU has them, on NumPy's arrays: for `ttir_operations`."""

from collections.abc import Callable
from typing import Any

import numpy as np


def unsigned(x: Any) -> Any:
    """The same bits without a sign."""
    x = np.asarray(x)
    return x if x.dtype == bool else x.view(f"u{x.dtype.itemsize}")


def divided(x: Any, y: Any) -> tuple[Any, Any]:
    """Quotient, cut towards zero, and rest; by zero it may be anything."""
    dtype = np.asarray(x).dtype
    assert dtype.itemsize < 8
    wide = [np.asarray(z).astype(np.int64) for z in (x, y)]
    by = np.where(wide[1] == 0, 1, wide[1])
    quotient = np.abs(wide[0]) // np.abs(by) * np.where((wide[0] < 0) ^ (by < 0), -1, 1)
    found = (quotient, wide[0] - quotient * by)
    return found[0].astype(dtype), found[1].astype(dtype)


def shifted(function: Callable[..., Any], x: Any, y: Any) -> Any:
    """Shifts; by as many bits as there are, or more, anything: here nothing is left."""
    x, y = np.asarray(x), unsigned(y)
    bits = x.dtype.itemsize * 8
    return np.where(y < bits, function(x, np.minimum(y, bits - 1).astype(x.dtype)), 0).astype(
        x.dtype
    )


def to_integer(x: Any, dtype: np.dtype) -> Any:
    """Cut towards zero, and held to what the integer holds, as GPUs do."""
    ends = np.iinfo(dtype)
    wide = np.trunc(np.nan_to_num(np.asarray(x, np.float64), nan=0.0, posinf=1e30, neginf=-1e30))
    return np.clip(wide, ends.min, ends.max).astype(dtype)
