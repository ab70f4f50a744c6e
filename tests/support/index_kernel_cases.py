"""The kernels that make an index, as what lowers them: a part of `kernel_cases`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.build_clusters import capacity
from pallas_kernels.build_clusters import triton as build_clusters
from pallas_kernels.build_moments import triton as build_moments
from pallas_kernels.encode_tokens import triton as encode_tokens
from pallas_kernels.types import Clusters

ROWS, TOKENS, CLUSTER, MOST = 64, 8192, 32, 64
CLUSTERS = capacity(TOKENS, CLUSTER, MOST)


def index_calls(head_dim: int, dtype: str) -> dict[str, Any]:
    """Functions, shapes of their operands, and the names of the kernels that they launch."""

    def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = of(ROWS, TOKENS, head_dim, dtype=dtype)
    build = functools.partial(
        build_clusters.build_clusters, cluster_size=CLUSTER, max_cluster_size=MOST, iterations=10
    )
    means = of(ROWS, CLUSTERS, head_dim, dtype=jnp.float32)
    clusters = Clusters(means, means, of(ROWS, CLUSTERS + 1), of(ROWS, TOKENS))
    matrix = of(head_dim, head_dim, dtype=jnp.float32)
    made = {"assign_tokens", "move_centroids", "cut_clusters", "average_pieces"}
    return {
        "build_clusters": (build, (keys, keys, of()), made),
        "build_moments": (
            functools.partial(build_moments.build_moments, rank=4),
            (keys, keys, clusters),
            {"build_moments"},
        ),
        "encode_tokens": (encode_tokens.encode_tokens, (keys, keys, matrix), {"encode_tokens"}),
    }
