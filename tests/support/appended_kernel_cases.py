"""Calls of `attend_appended` for large shapes: a part of `kernel_cases`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attend_appended import triton
from pallas_kernels.types import KeptRows, Rows

LAYERS, BATCH, HEADS, NEW = 2, 2, 8, 128
ROOMS = {"window": 1216, "sinks": 4, "store": 131_072}


def appended_calls(group: int, head_dim: int, dtype: str) -> dict[str, Any]:
    """By name: a function, its operands, and the names of its kernels."""

    def array(*shape: int, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    def rows(room: int, *vectors: int, levels: bool = False) -> Rows:
        stack = (LAYERS, BATCH, HEADS, room, *vectors)
        scales = array(*stack, of=jnp.float32) if levels else None
        return Rows(array(*stack, head_dim, of=jnp.int8 if levels else dtype), scales)

    tokens, number = array(BATCH), array()
    query = array(NEW, HEADS, group, head_dim, of=dtype)
    window, sinks, store = (KeptRows(rows(room, 2), None, tokens) for room in ROOMS.values())
    levels = store._replace(keys=rows(ROOMS["store"], 2, levels=True))
    cache = KeptRows(rows(ROOMS["store"]), rows(ROOMS["store"]), tokens)
    attend = functools.partial(triton.attend_appended, scale=0.1)
    kept = {
        "": (window, (sinks, store)),
        "-levels": (window, (sinks, levels)),
        "-dense": (cache, ()),
    }
    if dtype == "float16":  # It holds no weights times scales.
        del kept["-levels"]
    return {
        f"attend_appended{name}": (
            attend,
            (query, own, others, number, number, number),
            {"attend_appended", "merge_states"},
        )
        for name, (own, others) in kept.items()
    }
