"""The clusters' moments and spread in the index: room for them, and those of new clusters."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.build_moments import in_int8
from pallas_kernels.types import Clusters, Moments, Spread
from wavejax.config import WaveConfig
from wavejax.store.shape import STACK

T = TypeVar("T")

_VECTORS = (*STACK, "clusters", "directions", "head_dim")
_NUMBERS = (*STACK, "clusters", "directions")

MOMENT_AXES = {
    "directions": _VECTORS,
    "weights": _VECTORS,
    "lambdas": _NUMBERS,
    "weight_scales": _NUMBERS,
}


SPREAD_AXES = dict.fromkeys(Spread._fields, (*STACK, "clusters"))


def check_staged(config: WaveConfig, staged: bool) -> None:
    """Raise InputError: there are moments, an audit or a tolerance, and KV rows are staged."""
    for name in ("audit", "tolerance"):
        if getattr(config, name) and staged:
            raise InputError(
                f"`{name}` is not 0 and rows in host memory are staged, which no step has all of: "
                f"give `{name}=0`, or `store=device`"
            )
    if config.moment_rank and staged:
        raise InputError(
            "`moment_rank` is not 0 and rows in host memory are staged, but the estimate needs all "
            "retrieved rows at once: give `moment_rank=0`, or `store=device`"
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
    return _put(moments, built, at)


def init_spread(config: WaveConfig, clusters: tuple[int, ...]) -> Spread | None:
    """Make room for the spread of clusters; None where the settings want no bounds.

    Args:
        config: the settings.
        clusters: `(layers, batch, kv_heads, clusters)`.
    """
    if not config.bounds:
        return None
    return Spread(*(jnp.zeros(clusters, jnp.float32) for _ in Spread._fields))


def put_spread(
    spread: Spread | None, keys: Array, values: Array, clusters: Clusters, at: tuple[Any, ...]
) -> Spread | None:
    """Measure new clusters' spread and write it beside the others'; None stays None.

    Args:
        spread: the index's.
        keys, values, clusters, at: as for `put_moments`.
    """
    return None if spread is None else _put(spread, ops.build_spread(keys, values, clusters), at)


def _put(stacks: T, new: T, at: tuple[Any, ...]) -> T:
    return jax.tree.map(
        lambda stack, x: stack.at[at].set(x.astype(stack.dtype), mode="drop"), stacks, new
    )
