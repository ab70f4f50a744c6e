"""Attention by blocks of rows: an online softmax, shared by Triton kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED


class Vectors(NamedTuple):
    """Keys or values of a block of rows, as kernels read them.

    Attributes:
        rows: `Rows` of refs: `[layers, batch, kv_heads, tokens, *vectors, head_dim]`.
        place: which of a row's vectors, an index; none where rows are of one vector.
    """

    rows: Any
    place: tuple[int, ...] = ()

    def load(self, at: tuple[Any, ...], row: Any, dims: Any, mask: Any, dtype: Any) -> Any:
        """Read a block `[n, d]`; levels as numbers of a dtype that holds them."""
        here = (*at, row[:, None], *self.place, dims[None, :])
        block = backend.load(self.rows.data.at[here], mask=mask, other=0.0)
        return block if self.rows.scales is None else block.astype(dtype)

    def scaled(self, x: Any, at: tuple[Any, ...], row: Any, exists: Any) -> Any:
        """Multiply `[q, n]` by the block's scales, if there are any: so levels need not be."""
        if self.rows.scales is None:
            return x
        scales = self.rows.scales.at[(*at, row, *self.place)]
        return x * backend.load(scales, mask=exists, other=0.0)[None, :]


def nothing(queries: int, dims: int) -> tuple[Any, Any, Any]:
    """Begin a softmax: the weighted values `[q, d]`, the weights' sum and the peak `[q]`."""
    return (
        jnp.zeros((queries, dims), jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.full(queries, MASKED, jnp.float32),
    )


def take_in(
    carry: tuple[Any, Any, Any],
    query: Any,
    keys: Vectors,
    values: Vectors,
    at: tuple[Any, ...],
    row: Any,
    exists: Any,
    seen: Any,
    dims: Any,
    in_dims: Any,
    scale: float,
) -> tuple[Any, Any, Any]:
    """Take a block of rows into a softmax.

    Args:
        carry: as of `nothing`.
        query: `[q, d]`.
        keys, values: where they are.
        at: layer, sequence and kv head of the rows.
        row, exists: `[n]`, which rows they are, and whether there is one.
        seen: `[q, n]` or `[1, n]`, which of them a query sees.
        dims, in_dims: `[d]`, the dimensions, and whether there is one.
        scale: multiplies every product.
    """
    total, weight, peak = carry
    mask = exists[:, None] & in_dims[None, :]
    products = scale * launch.dot(query, keys.load(at, row, dims, mask, query.dtype), (1, 1))
    logits = jnp.where(seen, keys.scaled(products, at, row, exists), MASKED)
    higher = jnp.maximum(peak, jnp.max(logits, axis=1))
    mass = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
    fade = jnp.exp(peak - higher)
    v = values.load(at, row, dims, mask, query.dtype)
    weights = values.scaled(mass, at, row, exists).astype(v.dtype)
    total = total * fade[:, None] + launch.dot(weights, v)
    return total, weight * fade + jnp.sum(mass, axis=1), higher
