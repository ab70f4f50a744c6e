"""A kept sequence's arrays are put into a slot of an attention's state, all of them or a prefix."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
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
    Cut,
    cluster_cut_segment,
    cut_arrays,
    cut_at,
    rows_between,
)
from wavejax.engine.staged_state import StagedState, on_device_of, with_device_part
from wavejax.store.index import WaveIndex
from wavejax.store.state import WaveState

_AHEAD = 2  # Layers whose files are read and checked while an earlier one is put in its place.
_WINDOW = "steady/window"
_ROWS, _SCALES = "store/rows/data", "store/rows/scales"
Coming = concurrent.futures.Future[np.ndarray]


def grown_tokens(folder: Folder) -> int:
    """Count the tokens in a kept index that did not come with its prompt."""
    if "index/prompt_tokens" not in folder.arrays:
        return 0
    prompt = int(folder.arrays["index/prompt_tokens"].read())
    return int(folder.facts["sizes"]["tokens"]) - prompt


def shortest_prompt(folder: Folder, begun: Sequence[int]) -> int:
    """Count the tokens of the shortest prompt that a state for a document must be made for.

    The clusters that are kept are as large as those of the tokens that were indexed at once.

    Args:
        folder: the document's.
        begun: of each sequence, the tokens that go where prompts go.
    """
    if "index/prompt_tokens" not in folder.arrays:
        return min(begun)
    indexed = int(folder.arrays["index/prompt_tokens"].read())
    settings = folder.facts["fingerprints"]["settings"]
    beside = settings["sink_tokens"] + settings["local_tokens"]
    return min(*begun, indexed + beside) if indexed else 1


def check_arrays(folder: Folder, attention_state: Any) -> None:
    """Raise InputError where a state has an array that a document lacks."""
    for part in arrays.parts_of(attention_state):
        name = f"{part.name}/0" if part.by_layer else part.name
        if name not in folder.arrays:
            raise InputError(
                f"{folder.path} has no {name}: it was kept with other settings; read the document "
                "again"
            )


class Restoring:
    """Puts a kept sequence into a slot, step by step: its rows first, its lengths last.

    Between two steps other slots may be decoded, if this one is parked (`batching.reading`): until
    the last step it has no length, and what a decode step writes there is written over.

    Args:
        folder: the document's.
        attention_state: as the engine holds it; only looked at.
        slot: whose place.
        config: wave attention's settings; None for full attention.
        length: tokens to take, from the first one; None for all.
        rest: tokens to come after them, for which there must be room.

    Raises:
        InputError: an array is damaged, or the state has no room. Rows are read by the steps, which
            raise what is found there.
    """

    def __init__(
        self,
        folder: Folder,
        attention_state: Any,
        slot: int,
        config: WaveConfig | None,
        length: int | None,
        rest: int,
    ):
        self._slot, self._config = slot, config
        staged, state = isinstance(attention_state, StagedState), on_device_of(attention_state)
        parts = {part.name: part for part in arrays.parts_of(attention_state)}
        small = [name for name, part in parts.items() if not part.by_layer]
        kept = {name: folder.arrays[name].read() for name in small}
        self._cut: Cut | None = None
        if length is not None and config is not None:
            counts = (int(kept[name]) for name in ("index/tokens", "index/prompt_tokens"))
            self._cut, window = cut_at(config, length, *counts), kept[_WINDOW]
            stores = _read_stores(folder, window.shape[0])
            self._between = functools.partial(_rows_of, stores, window)
            kept = cut_arrays(self._cut, kept, {name: _axes(part) for name, part in parts.items()})
            start, end = self._cut.indexed, self._cut.indexed + self._cut.window
            kept[_WINDOW] = np.stack([self._between(i, start, end) for i in range(len(stores))])
        elif length is not None:
            kept["tokens"] = np.asarray(length, np.int32)
        first = length if self._cut is None else self._cut.indexed
        _check_room(folder, parts, kept, first)
        if rest > _room_left(state, config, kept):
            raise _no_room(f" and the {rest} tokens after it")
        self._kept, self._work = kept, collections.deque[Callable[[Any], Any]]()
        for name, part in parts.items():
            if part.by_layer:
                layers = range(part.array.shape[0])
                files = [folder.arrays[f"{name}/{layer}"] for layer in layers]
                self._plan_rows(name, files, first, staged and name == _ROWS)
        self._work.append(self._put_small)

    @property
    def steps(self) -> int:
        """Count the steps that are left: about as long each, but for the last one."""
        return len(self._work)

    def step(self, attention_state: Any) -> Any:
        """Do one step; donates `attention_state`, as the engine holds it now.

        Raises:
            InputError: rows are damaged. Nothing is donated then.
        """
        return self._work.popleft()(attention_state)

    def _plan_rows(
        self, name: str, files: list[StoredArray], first: int | None, held: bool
    ) -> None:
        """List the steps that put rows in their place; the host holds those that are `held`."""
        if held and self._cut is None:
            self._work.append(functools.partial(self._receive, files))
            return
        # The next layers' files are read and checked while one is put in its place.
        pool = concurrent.futures.ThreadPoolExecutor(_AHEAD)
        coming = [pool.submit(_first, file, first) for file in files]
        pool.shutdown(wait=False)
        for layer, rows in enumerate(coming):
            put = self._fill if held else functools.partial(self._put_layer, name)
            self._work.append(functools.partial(put, layer, rows))

    def _receive(self, files: list[StoredArray], attention_state: StagedState) -> StagedState:
        """Have staged rows arrive in a thread of their own."""
        rows = ArrivingRows(attention_state.rows)
        rows.receive(self._slot, files)
        return StagedState(attention_state.on_device, rows)

    def _fill(self, layer: int, coming: Coming, attention_state: StagedState) -> StagedState:
        held, rows = attention_state.rows, coming.result()
        if isinstance(held, ArrivingRows):
            held.settle(self._slot)
        held.take_in()
        held.rows[layer, self._slot, :, : rows.shape[1]] = rows
        return attention_state

    def _put_layer(self, name: str, layer: int, coming: Coming, attention_state: Any) -> Any:
        rows = coming.result()
        state = on_device_of(attention_state)
        part = next(part for part in arrays.parts_of(attention_state) if part.name == name)
        # One layer is on its way at a time: XLA pins memory for it, which a limit is set to.
        jax.block_until_ready(part.array)
        state = _replaced(state, {name: arrays.put(part, self._slot, rows, layer)})
        return with_device_part(attention_state, state)

    def _put_small(self, attention_state: Any) -> Any:
        """Put all but the rows; then the slot holds the sequence."""
        state = on_device_of(attention_state)
        parts = {part.name: part for part in arrays.parts_of(attention_state)}
        put = {name: arrays.put(parts[name], self._slot, x) for name, x in self._kept.items()}
        state = _replaced(state, put)
        if isinstance(state, WaveState):
            state = arrays.begin(state, jnp.int32(self._slot))
            state = dataclasses.replace(state, index=self._clustered(state.index))
        else:
            assert isinstance(state, DenseState)
        return with_device_part(attention_state, state)

    def _clustered(self, index: WaveIndex) -> WaveIndex:
        """Cluster the tokens of a segment that was cut, in all layers."""
        cut, config = self._cut, self._config
        if cut is not None and cut.indexed > cut.kept:
            assert config is not None
            for layer in range(index.token_ids.shape[0]):
                rows = self._between(layer, cut.kept, cut.indexed)
                index = cluster_cut_segment(config, index, self._slot, cut, layer, rows)
        return index


def _replaced(state: Any, new: Mapping[str, Any]) -> Any:
    """Return a state with some of its arrays replaced, by name."""
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves = [new.get(arrays.name_of(path), leaf) for path, leaf in paths]
    return jax.tree.unflatten(tree, leaves)


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
