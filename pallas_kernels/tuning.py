"""Tuned configs by device kind and shape; `scripts/tune_kernels.py` writes the table."""

import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels import backend

TABLE = Path(__file__).with_name("tuned_configs.json")

ConfigT = TypeVar("ConfigT")


def key(**shape: object) -> str:
    """Make a shape's name in the table. Large numbers count by their power of two."""
    parts = []
    for name, value in sorted(shape.items()):
        if isinstance(value, int):
            value = value if value <= 256 else f"2^{(value - 1).bit_length()}"
        parts.append(f"{name}={value}")
    return " ".join(parts)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def device_kind() -> str | None:
    """Return the GPU's name, as the table has it; None without a GPU."""
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def config(op: str, heuristic: ConfigT, **shape: object) -> ConfigT:
    """Return the tuned config for this device kind and shape, or else the heuristic one.

    Args:
        op: the op's name.
        heuristic: a config for the shape, of the op's own class.
        shape: what the table distinguishes.
    """
    kind = device_kind() if backend.is_for_default_device() else None
    found = _table().get(kind or "", {}).get(op, {}).get(key(**shape))
    return heuristic if found is None else type(heuristic)(**found)
