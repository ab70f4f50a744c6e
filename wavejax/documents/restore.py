"""A kept sequence's arrays are put into a slot of an attention's state, all of them or a prefix."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from pallas_kernels.types import Rows
from wavejax.attention.dense import DenseState
from wavejax.config import WaveConfig
from wavejax.documents import arrays
from wavejax.documents.arrays import Part
from wavejax.documents.arriving_rows import ArrivingRows
from wavejax.documents.files import Folder, StoredArray
from wavejax.documents.prefix import (
    cluster_cut_segment,
    cut_arrays,
    cut_at,
    rows_between,
)
from wavejax.engine.staged_state import StagedState
from wavejax.store.state import WaveState

_AHEAD = 2  # Layers whose files are read and checked while an earlier one is put in its place.
_WINDOW = "steady/window"
_ROWS, _SCALES = "store/rows/data", "store/rows/scales"


def grown_tokens(folder: Folder) -> int:
    """Count the tokens in a kept index that did not come with its prompt."""
    if "index/prompt_tokens" not in folder.arrays:
        return 0
    prompt = int(folder.arrays["index/prompt_tokens"].read())
    return int(folder.facts["sizes"]["tokens"]) - prompt


def check_arrays(folder: Folder, attention_state: Any) -> None:
    """Raise InputError where a state has an array that a document lacks."""
    for part in arrays.parts_of(attention_state):
        name = f"{part.name}/0" if part.by_layer else part.name
        if name not in folder.arrays:
            raise InputError(
                f"{folder.path} has no {name}: it was kept with other settings; read the document "
                "again"
            )


def restore(
    folder: Folder,
    attention_state: Any,
    slot: int,
    config: WaveConfig | None,
    length: int | None,
    rest: int,
) -> Any:
    """Put a kept sequence into a slot; donates `attention_state`.

    Args:
        folder: the document's.
        attention_state: as the engine holds it.
        slot: whose place.
        config: wave attention's settings; None for full attention.
        length: tokens to take, from the first one; None for all.
        rest: tokens to come after them, for which there must be room.

    Raises:
        InputError: an array is damaged, or the state has no room. Nothing is donated then, but
            where rows are damaged.
    """
    staged = isinstance(attention_state, StagedState)
    state = attention_state.on_device if staged else attention_state
    parts = {part.name: part for part in arrays.parts_of(attention_state)}
    kept = {name: folder.arrays[name].read() for name, part in parts.items() if not part.by_layer}
    cut = None
    stores: list[Rows] = []
    if length is not None and config is not None:
        counts = (int(kept[name]) for name in ("index/tokens", "index/prompt_tokens"))
        cut, window = cut_at(config, length, *counts), kept[_WINDOW]
        stores = _read_stores(folder, window.shape[0])
        between = functools.partial(_rows_of, stores, window)
        kept = cut_arrays(cut, kept, {name: _axes(part) for name, part in parts.items()})
        end = cut.indexed + cut.window
        kept[_WINDOW] = np.stack([between(i, cut.indexed, end) for i in range(len(stores))])
    elif length is not None:
        kept["tokens"] = np.asarray(length, np.int32)
    _check_room(folder, parts, kept, length if cut is None else cut.indexed)
    left = _room_left(state, config, kept)
    if rest > left:
        raise _no_room(f" and the {rest} tokens after it")
    new = {name: arrays.put(parts[name], slot, array) for name, array in kept.items()}
    for name, part in parts.items():
        if not part.by_layer:
            continue
        layers = part.array.shape[0]
        files = [folder.arrays[f"{name}/{layer}"] for layer in range(layers)]
        held = staged and name == _ROWS
        if held and cut is None:
            rows = ArrivingRows(attention_state.rows)
            rows.receive(slot, files)
            attention_state = StagedState(state, rows)
            continue
        first = length if cut is None else cut.indexed
        reads: list[Callable[[], np.ndarray]]
        reads = [functools.partial(_first, file, first) for file in files]
        if held:
            _fill(attention_state, slot, reads)
        else:
            new[name] = _put_layers(part, slot, reads)
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves = [new.get("/".join(key.name for key in path), leaf) for path, leaf in paths]
    state = jax.tree.unflatten(tree, leaves)
    if isinstance(state, WaveState):
        state = arrays.begin(state, jnp.int32(slot))
        if cut is not None and cut.indexed > cut.kept:
            assert config is not None
            index = state.index
            for layer in range(len(stores)):
                rows_of_cut = between(layer, cut.kept, cut.indexed)
                index = cluster_cut_segment(config, index, slot, cut, layer, rows_of_cut)
            state = dataclasses.replace(state, index=index)
    else:
        assert isinstance(state, DenseState)
    return StagedState(state, attention_state.rows) if staged else state


def _check_room(
    folder: Folder, parts: dict[str, Part], kept: dict[str, np.ndarray], rows: int | None
) -> None:
    """Raise InputError where a part has no room for what is put there; `rows` None for all."""
    shapes = {name: array.shape for name, array in kept.items()}
    for name, part in parts.items():
        shape = shapes.get(name)
        if part.by_layer:
            kv_heads, tokens, *rest = folder.arrays[f"{name}/0"].shape
            shape = (kv_heads, tokens if rows is None else rows, *rest)
        if not arrays.fits(part, shape or (), part.by_layer):
            raise _no_room()


def _room_left(state: Any, config: WaveConfig | None, kept: dict[str, np.ndarray]) -> int:
    """Count the tokens that a slot has room for after a kept sequence, as `remaining` will."""
    if config is None:
        return int(state.keys.shape[3]) - int(kept["tokens"])
    grown = int(kept["index/tokens"]) - int(kept["index/prompt_tokens"])
    growths = int(state.index.growths) - grown // config.growth_tokens
    free = config.window_tokens - int(kept["steady/window_tokens"])
    return free + config.growth_tokens * growths


def _no_room(more: str = "") -> InputError:
    return InputError(
        f"the state has no room for the document{more}: make it with the document's `start`, or "
        "`Generator.allocate` with more tokens"
    )


def _axes(part: Part) -> tuple[str, ...]:
    """Name the axes that a part's kept array has."""
    return (part.axes[0], *part.axes[2:]) if part.axes[:2] == arrays.STACKED else ()


def _read_stores(folder: Folder, layers: int) -> list[Rows]:
    """Map the kept row store of every layer, and check it."""

    def read(layer: int) -> Rows:
        data, scales = (folder.arrays.get(f"{name}/{layer}") for name in (_ROWS, _SCALES))
        kept: Any = data and data.read(), scales and scales.read()
        return Rows(*kept)

    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        return list(pool.map(read, range(layers)))


def _rows_of(
    stores: list[Rows], window: np.ndarray, layer: int, start: int, end: int
) -> np.ndarray:
    return rows_between(stores[layer], window[layer], start, end)


def _first(file: StoredArray, tokens: int | None) -> np.ndarray:
    """Read a layer's first rows."""
    return file.read()[:, :tokens]


def _fill(attention_state: StagedState, slot: int, reads: list[Callable[[], np.ndarray]]) -> None:
    held = attention_state.rows
    if isinstance(held, ArrivingRows):
        held.settle(slot)
    held.take_in()
    for layer, read in enumerate(reads):
        rows = read()
        held.rows[layer, slot, :, : rows.shape[1]] = rows


def _put_layers(part: Part, slot: int, reads: list[Callable[[], np.ndarray]]) -> Any:
    """Put the rows of all layers into a slot; the next layers' files are checked meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        coming = [pool.submit(read) for read in reads]
        for layer, rows in enumerate(coming):
            part = part._replace(array=arrays.put(part, slot, rows.result(), layer))
    return part.array
