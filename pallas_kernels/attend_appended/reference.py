"""The semantics of `attend_appended`, in plain JAX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.rounding import dequantise
from pallas_kernels.types import MASKED, KeptRows, Rows


def attend_appended(
    query: Array,
    own: KeptRows,
    others: Sequence[KeptRows],
    count: Array | int,
    sequence: Array | int,
    layer: Array | int,
    *,
    scale: float,
) -> Array:
    """See `pallas_kernels.attend_appended`."""
    new = jnp.arange(query.shape[0])
    keys, values, seen = [], [], []
    for kept in (own, *others):
        key, value = _of_sequence(kept, sequence, layer)
        place, used = jnp.arange(key.shape[1]), kept.tokens[sequence]
        limits = jnp.full_like(new, used)
        if kept is own:
            limits = used + 1 + jnp.minimum(new, count - 1)
        keys.append(key)
        values.append(value)
        seen.append(place < limits[:, None])
    key, value = (jnp.concatenate(arrays, axis=1) for arrays in (keys, values))
    visible = jnp.concatenate(seen, axis=1)
    # What no token sees may be NaN, which a weight of zero would not keep out.
    value = jnp.where(visible.any(axis=0)[:, None], value.astype(jnp.float32), 0.0)
    logits = scale * jnp.einsum("nhgd,htd->nhgt", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(visible[:, None, None, :], logits, MASKED)
    return jnp.einsum("nhgt,htd->nhgd", jax.nn.softmax(logits), value).astype(query.dtype)


def _of_sequence(kept: KeptRows, sequence: Array | int, layer: Array | int) -> tuple[Array, Array]:
    """Take keys and values `[kv_heads, room, head_dim]`, as numbers."""

    def of(rows: Rows) -> Array:
        return dequantise(jax.tree.map(lambda x: x[layer, sequence], rows))

    if kept.values is None:
        both = of(kept.keys)
        return both[..., 0, :], both[..., 1, :]
    return of(kept.keys), of(kept.values)
