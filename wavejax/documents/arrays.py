"""The arrays of one sequence of an attention's state: taken out of a slot, and put into one.

Generic over a state's classes: each array's axes have names (`AXES`), which say what of it belongs
to a sequence and how much of it is in use. The row cache is not kept: it begins empty.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels import _compat
from pallas_kernels.types import Rows
from wavejax._pytree import logical_axes
from wavejax.attention.dense import DenseState
from wavejax.engine.staged_state import StagedState
from wavejax.store.rows import forget
from wavejax.store.state import WaveState

STACKED = ("layers", "sequences")
# The row cache, and what steps count; what has no axis of sequences is not kept either.
_NOT_KEPT = ("cache", "attended", "tolerance")
# The bulk of a state, kept layer by layer.
_STORE = ("store/rows/data",)
_ROWS = ("store/rows", "keys", "values")
# What is kept under the name that it had before it had scales.
_NAMED_BEFORE = {"keys/data": "keys", "values/data": "values"}


class Part(NamedTuple):
    """One array of a state.

    Attributes:
        name: as "index/centroids".
        axes: the names of its axes.
        array: of all sequences; of staged rows NumPy's.
    """

    name: str
    axes: tuple[str, ...]
    array: Any

    @property
    def by_layer(self) -> bool:
        """Whether it is kept layer by layer: it is large."""
        return self.name.startswith(_ROWS)

    @property
    def kept_axes(self) -> tuple[str, ...]:
        """The names of the axes that its kept array has, if it is not kept by layer."""
        return (self.axes[0], *self.axes[2:]) if self.axes[:2] == STACKED else ()


def name_of(path: tuple[Any, ...]) -> str:
    """Name an array of a state, by its path, as it is named in a document."""
    name = "/".join(key.name for key in path)
    return _NAMED_BEFORE.get(name, name)


def parts_of(attention_state: Any) -> Iterator[Part]:
    """List what is kept of an attention's state, as an engine holds it."""
    state = attention_state
    if isinstance(state, StagedState):
        state.rows.take_in()
        state = state.on_device
    named = jax.tree.leaves(logical_axes(state), is_leaf=lambda x: isinstance(x, PartitionSpec))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, array), axes in zip(leaves, named, strict=True):
        name = name_of(path)
        if name.startswith(_NOT_KEPT) or "sequences" not in axes:
            continue
        if name in _STORE and isinstance(attention_state, StagedState):
            array = attention_state.rows.rows
        yield Part(name, tuple(axes), array)


def used(attention_state: Any, slot: int) -> dict[str, int]:
    """Count what of each axis a sequence uses; raises InputError for another attention's state."""
    state = attention_state
    state = state.on_device if isinstance(state, StagedState) else state
    if isinstance(state, DenseState):
        return {"tokens": int(state.tokens[slot])}
    if not isinstance(state, WaveState):
        raise InputError(
            f"a {type(state).__name__} cannot be kept: give a state of WaveAttention or of "
            "DenseAttention"
        )
    clusters = int(np.max(np.asarray(state.index.num_clusters[:, slot]), initial=0))
    return {
        "tokens": int(state.index.tokens[slot]),
        "clusters": clusters,
        "cluster_edges": clusters + 1,
        "window": int(state.steady.window_tokens[slot]),
    }


def take(attention_state: Any, slot: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """List a sequence's arrays: the name of each, and what brings it to the host.

    Rows come layer by layer, as "store/rows/data/0".
    """
    sizes = used(attention_state, slot)
    for part in parts_of(attention_state):
        if part.by_layer:
            for layer in range(part.array.shape[0]):
                yield f"{part.name}/{layer}", functools.partial(_take, part, slot, sizes, layer)
        else:
            yield part.name, functools.partial(_take, part, slot, sizes)


def padded(part: Part, kept: np.ndarray, first: int, layers: int) -> np.ndarray:
    """Make some layers of a kept array as long as its part's room: what `put_layers` takes."""
    room = part.array.shape[2:]
    some = kept[first : first + layers]
    pad = [(0, have - want) for have, want in zip(room, some.shape[1:], strict=True)]
    # Clusters past the last one end where it ends.
    mode = "edge" if "cluster_edges" in part.axes else "constant"
    return np.pad(some, [(0, 0), *pad], mode=mode)  # type: ignore[call-overload]


def put_layers(part: Part, slot: int, first: int, block: Array) -> Array:
    """Put what `padded` made into a slot, and return the new array; `part.array` is donated."""
    return _put_layers(part.array, block, np.int32(first), np.int32(slot))


def put_number(part: Part, slot: int, kept: np.ndarray) -> Array:
    """Put a sequence's number into its slot, and return the new array; `part.array` is donated."""
    return _put_number(part.array, kept, np.int32(slot))


def put_rows(part: Part, slot: int, layer: int, start: int, heads: Sequence[Array]) -> Array:
    """Put rows into a slot from one on, and return the new array; `part.array` is donated.

    Args:
        part: by layer.
        slot: whose place.
        layer: whose rows.
        start: the first row.
        heads: of each kv head, its rows, on the device.
    """
    write = _append if part.name in _STORE else _put_rows
    return write(part.array, tuple(heads), np.int32(layer), np.int32(slot), np.int32(start))


def fits(part: Part, kept_shape: tuple[int, ...], layer: bool) -> bool:
    """Whether a kept array of a shape has room in a part."""
    layers, room = part.array.shape[:1], part.array.shape[1:]
    if part.axes[:2] == STACKED:
        room = room[1:] if layer else (*layers, *room[1:])
    return len(room) == len(kept_shape) and all(
        have >= want for have, want in zip(room, kept_shape, strict=True)
    )


@functools.partial(jax.jit, donate_argnums=0)
def begin(state: WaveState, slot: Array) -> WaveState:
    """Empty a slot's row cache and its counts, for a kept sequence to take its place."""
    cache, attended = forget(state.cache, slot), state.attended.at[slot].set(0.0)
    return dataclasses.replace(state, cache=cache, attended=attended)


def _take(part: Part, slot: int, sizes: dict[str, int], layer: int | None = None) -> np.ndarray:
    array, axes = part.array, part.axes
    if axes[:2] != STACKED:
        return np.asarray(np.asarray(array)[slot])
    if layer is not None:
        axes = axes[2:]
        one = array[layer, slot] if isinstance(array, np.ndarray) else None
        if one is None:
            one = np.asarray(_take_layer(array, jnp.asarray([layer, slot], jnp.int32)))
    else:
        axes = (axes[0], *axes[2:])
        one = np.asarray(_take_all(array, np.int32(slot)))
    cut = tuple(slice(sizes.get(name)) if name in sizes else slice(None) for name in axes)
    return one[cut]


@jax.jit
def _take_layer(array: Array, where: Array) -> Array:
    """One layer and sequence of an array on the device, or in host memory; see `read_rows`."""
    rest = array.shape[2:]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(rest))), collapsed_slice_dims=(0, 1), start_index_map=(0, 1)
    )

    def gather(array: Array, where: Array) -> Array:
        mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return lax.gather(array, where, numbers, (1, 1, *rest), mode=mode)

    if jax.typeof(array).memory_space != jax.memory.Space.Host:
        return gather(array, where)
    where = jax.device_put(where, jax.memory.Space.Host)
    return jax.device_put(_compat.run_on_host(gather, array, where), jax.memory.Space.Device)


@jax.jit
def _take_all(array: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(array, slot, axis=1, keepdims=False)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layers(array: Array, block: Array, first: Array, slot: Array) -> Array:
    zero = jnp.int32(0)
    where = (first, slot, *(zero for _ in block.shape[1:]))
    return lax.dynamic_update_slice(array, block[:, None].astype(array.dtype), where)


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(
    array: Array, heads: tuple[Array, ...], layer: Array, slot: Array, start: Array
) -> Array:
    block = jnp.stack(heads)[None, None].astype(array.dtype)
    zero = jnp.int32(0)
    where = (layer, slot, zero, start, *(zero for _ in block.shape[4:]))
    return lax.dynamic_update_slice(array, block, where)


@functools.partial(jax.jit, donate_argnums=0)
def _append(
    array: Array, heads: tuple[Array, ...], layer: Array, slot: Array, start: Array
) -> Array:
    return ops.append_rows(Rows(array), jnp.stack(heads), layer, slot, start).data


@functools.partial(jax.jit, donate_argnums=0)
def _put_number(array: Array, value: Array, slot: Array) -> Array:
    return array.at[slot].set(value)
