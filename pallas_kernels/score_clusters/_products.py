"""Programs of `score_clusters` that multiply the query with other vectors than the centroids."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import backend as plt
from pallas_kernels.score_clusters._config import Config
from pallas_kernels.toolbox import launch


def load_query(query_ref: Any, b: Any, h: Any) -> tuple[Any, Any, Any, Any]:
    """Load a row's queries `[g, dim]`: g, dim, which dims there are, and the queries."""
    _, _, group, head_dim = query_ref.shape
    g = jnp.arange(launch.DOT_TILE)[:, None]
    dim = jnp.arange(launch.tile(head_dim))
    in_dim = dim < head_dim
    query = plt.load(
        query_ref.at[b, h, g, dim[None, :]],
        mask=(g < group) & in_dim[None, :],
        other=0,
    )
    return g, dim, in_dim, query


def multiply_vectors(
    query_ref: Any,
    directions_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    products_ref: Any,
    *,
    part: Any,
    row: Any,
    scale: float,
    config: Config,
) -> None:
    """Multiplies the query with a run of a row's directions, those of a cluster side by side.

    Without offsets all vectors are there, whatever clusters are.
    """
    _, kv_heads, group, _ = query_ref.shape
    room = directions_ref.shape[3]
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    g, dim, in_dim, query = load_query(query_ref, b, h)
    dtype = product_dtype(query.dtype, directions_ref.dtype)
    if offsets_ref is not None:
        clusters = offsets_ref.shape[3] - 1
        end = plt.load(offsets_ref.at[layer, b, h, jnp.int32(clusters)])

    def visit(i: Any, carry: None) -> None:
        n = (part * config.blocks + i) * config.block + jnp.arange(config.block)
        in_use = exists = n < room
        if offsets_ref is not None:
            cluster = lax.div(n, jnp.int32(room // clusters))
            begins = plt.load(offsets_ref.at[layer, b, h, cluster], mask=exists, other=0)
            # Nothing is read of clusters past the last one in use.
            in_use = exists & (begins < end)
        directions = plt.load(
            directions_ref.at[layer, b, h, n[:, None], dim[None, :]],
            mask=in_use[:, None] & in_dim[None, :],
            other=0,
        )
        products = scale * launch.dot(query.astype(dtype), directions.astype(dtype), (1, 1))
        plt.store(
            products_ref.at[b, h, g, n[None, :]], products, mask=(g < group) & exists[None, :]
        )

    if config.blocks == 1:
        visit(0, None)  # A loop would take room for the blocks to come.
    else:
        lax.fori_loop(0, config.blocks, visit, None)


def product_dtype(query: Any, directions: Any) -> Any:
    """Choose a dtype that holds both: int8 levels are whole numbers that every float holds."""
    return query if directions == jnp.int8 else jnp.promote_types(query, directions)
