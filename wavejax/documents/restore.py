"""A kept sequence's arrays are put into a slot of an attention's state, all of them or a prefix."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.errors import InputError
from wavejax.attention.dense import DenseState
from wavejax.config import WaveConfig
from wavejax.documents import arrays
from wavejax.documents.arrays import Part
from wavejax.documents.arriving_rows import ArrivingRows
from wavejax.documents.files import Folder
from wavejax.documents.prefix import (
    Cut,
    cluster_cut_segment,
    cut_arrays,
    cut_at,
    map_store,
    rows_between,
)
from wavejax.documents.stored_arrays import StoredArray
from wavejax.documents.transfers import Checks, Transfers, piece_of
from wavejax.engine.staged_state import StagedState, on_device_of, with_device_part
from wavejax.store.index import WaveIndex
from wavejax.store.state import WaveState

_WINDOW = "steady/window"
_ROWS, _SCALES = "store/rows/data", "store/rows/scales"
Maker = Callable[[], np.ndarray]


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
        InputError: a length is damaged, or the state has no room. The steps raise what is found in
            other arrays.
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
        by_layer = {
            name: [folder.arrays[f"{name}/{layer}"] for layer in range(part.array.shape[0])]
            for name, part in parts.items()
            if part.by_layer
        }
        small = {name: folder.arrays[name] for name in parts if name not in by_layer}
        arriving = staged and length is None  # `ArrivingRows` check them
        in_order = [
            file
            for layer in zip(*by_layer.values(), strict=True)
            for name, file in zip(by_layer, layer, strict=True)
            if not (arriving and name == _ROWS)
        ]
        self._small, self._checks = small, Checks([*in_order, *small.values()])
        if length is not None:
            self._checks.wait(*small.values())
        # Of the others the lengths are asked for at once.
        kept = {name: file.map() if file.shape else file.read() for name, file in small.items()}
        self._cut: Cut | None = None
        if length is not None and config is not None:
            counts = (int(kept[name]) for name in ("index/tokens", "index/prompt_tokens"))
            self._cut, window = cut_at(config, length, *counts), kept[_WINDOW]
            stores = [
                map_store(folder.arrays, layer, _ROWS, _SCALES) for layer in range(window.shape[0])
            ]

            def between(layer: int, start: int, end: int) -> np.ndarray:
                return rows_between(stores[layer], window[layer], start, end)

            self._between = between
            kept = cut_arrays(
                self._cut, kept, {name: part.kept_axes for name, part in parts.items()}
            )
            start, end = self._cut.indexed, self._cut.indexed + self._cut.window
            kept[_WINDOW] = np.stack([self._between(i, start, end) for i in range(len(stores))])
        elif length is not None:
            kept["tokens"] = np.asarray(length, np.int32)
        first = length if self._cut is None else self._cut.indexed
        _check_room(folder, parts, kept, first)
        if rest > _room_left(state, config, kept):
            raise _no_room(f" and the {rest} tokens after it")
        self._work = collections.deque[Callable[[Any], Any]]()
        groups: list[list[Maker]] = []
        for name, files in by_layer.items():
            self._plan_rows(name, files, first, staged and name == _ROWS, groups)
        self._work.append(functools.partial(self._put_small, list(kept)))
        [device] = jax.tree.leaves(state)[0].devices()
        self._transfers = Transfers(device, groups)
        last = [functools.partial(arrays.padded, parts[name], x) for name, x in kept.items()]
        self._last = Transfers(device, [last])

    @property
    def steps(self) -> int:
        """Count the steps that are left: about as long each, but for the last one."""
        return len(self._work)

    def step(self, attention_state: Any) -> Any:
        """Do one step; donates `attention_state`, as the engine holds it now.

        Raises:
            InputError: an array is damaged. Nothing is donated then.
        """
        return self._work.popleft()(attention_state)

    def _plan_rows(
        self,
        name: str,
        files: list[StoredArray],
        first: int | None,
        held: bool,
        groups: list[list[Maker]],
    ) -> None:
        """List the steps that put rows in their place; the host holds those that are `held`."""
        if held and self._cut is None:
            self._work.append(functools.partial(self._receive, files))
            return
        for layer, file in enumerate(files):
            if held:
                self._work.append(functools.partial(self._fill, layer, file, first))
                continue
            tokens = file.shape[1] if first is None else first
            rows, starts = piece_of(file, tokens)
            mapped, heads = file.map(), range(file.shape[0])
            groups.append(
                [
                    functools.partial(_piece, mapped, head, start, rows)
                    for start in starts
                    for head in heads
                ]
            )
            self._work.append(functools.partial(self._put_layer, name, layer, file, starts))

    def _receive(self, files: list[StoredArray], attention_state: StagedState) -> StagedState:
        """Have staged rows arrive in a thread of their own."""
        rows = ArrivingRows(attention_state.rows)
        rows.receive(self._slot, files)
        return StagedState(attention_state.on_device, rows)

    def _fill(
        self, layer: int, file: StoredArray, first: int | None, attention_state: StagedState
    ) -> StagedState:
        self._checks.wait(file)
        held, rows = attention_state.rows, file.map()[:, :first]
        if isinstance(held, ArrivingRows):
            held.settle(self._slot)
        held.take_in()
        held.rows[layer, self._slot, :, : rows.shape[1]] = rows
        return attention_state

    def _put_layer(
        self,
        name: str,
        layer: int,
        file: StoredArray,
        starts: list[int],
        attention_state: Any,
    ) -> Any:
        self._checks.wait(file)
        pieces, heads = self._transfers.take(), file.shape[0]
        state = on_device_of(attention_state)
        for number, start in enumerate(starts):
            part = next(part for part in arrays.parts_of(attention_state) if part.name == name)
            of_heads = pieces[number * heads : (number + 1) * heads]
            put = arrays.put_rows(part, self._slot, layer, start, of_heads)
            state = _replaced(state, {name: put})
            attention_state = with_device_part(attention_state, state)
        return attention_state

    def _put_small(self, names: list[str], attention_state: Any) -> Any:
        """Put all but the rows; then the slot holds the sequence."""
        self._checks.wait(*self._small.values())
        state = on_device_of(attention_state)
        parts = {part.name: part for part in arrays.parts_of(attention_state)}
        blocks = dict(zip(names, self._last.take(), strict=True))
        put = {name: arrays.put(parts[name], self._slot, block) for name, block in blocks.items()}
        state = _replaced(state, put)
        if isinstance(state, WaveState):
            state = arrays.begin(state, np.int32(self._slot))
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


def _piece(rows: np.ndarray, head: int, start: int, count: int) -> np.ndarray:
    """Take one head's rows from one on: a part of the mapped file."""
    return rows[head, start : start + count]
