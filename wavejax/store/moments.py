"""The clusters' moments in the index: room for them, and those of new clusters."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.build_moments import in_int8
from pallas_kernels.types import Clusters, Moments
from wavejax.config import WaveConfig
from wavejax.store.shape import STACK

_VECTORS = (*STACK, "clusters", "directions", "head_dim")
_NUMBERS = (*STACK, "clusters", "directions")

MOMENT_AXES = {
    "directions": _VECTORS,
    "weights": _VECTORS,
    "lambdas": _NUMBERS,
    "weight_scales": _NUMBERS,
}


def check_staged(config: WaveConfig, staged: bool) -> None:
    """Raise InputError: there are to be moments, and KV rows are staged."""
    if config.moment_rank and staged:
        raise InputError(
            "moment_rank is not 0 and rows in host memory are staged, but the estimate needs all "
            "retrieved rows at once: give moment_rank 0, or keep the store on the device"
        )


def init_moments(
    config: WaveConfig, clusters: tuple[int, ...], head_dim: int, dtype: DTypeLike
) -> Moments | None:
    """Make room for the moments of clusters; None where the settings want none.

    Args:
        config: the settings.
        clusters: `(layers, batch, kv_heads, clusters)`.
        head_dim: numbers in a key.
        dtype: the model's, which `moment_dtype` may replace.
    """
    if not config.moment_rank:
        return None
    shape = (*clusters, config.moment_rank)
    kept = jnp.dtype(dtype if config.moment_dtype == "model" else config.moment_dtype)
    scaled = kept == jnp.int8
    return Moments(
        directions=jnp.zeros((*shape, head_dim), kept),
        weights=jnp.zeros((*shape, head_dim), kept),
        lambdas=jnp.zeros(shape, jnp.float32),
        weight_scales=jnp.zeros(shape, jnp.float32) if scaled else None,
    )


def put_moments(
    moments: Moments | None, keys: Array, values: Array, clusters: Clusters, at: tuple[Any, ...]
) -> Moments | None:
    """Build new clusters' moments and write them beside the others; None stays None.

    Args:
        moments: the index's.
        keys, values: of the segments, as `build_clusters` took them.
        clusters: of the segments.
        at: where in the stacks each cluster goes, NO_ID for none.
    """
    if moments is None:
        return None
    built = ops.build_moments(keys, values, clusters, rank=moments.lambdas.shape[-1])
    if moments.weight_scales is not None:
        built = in_int8(built)
    return jax.tree.map(
        lambda stack, new: stack.at[at].set(new.astype(stack.dtype), mode="drop"), moments, built
    )
