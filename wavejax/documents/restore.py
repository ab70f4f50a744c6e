"""A kept sequence's arrays are put into a slot of an attention's state, all of them or a prefix."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

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
from wavejax.documents.room import check_room, no_room, room_left
from wavejax.documents.stored_arrays import StoredArray
from wavejax.documents.transfers import Checks, Maker, Transfers, layer_pieces, row_pieces
from wavejax.engine.staged_state import StagedState, on_device_of, with_device_part
from wavejax.store.index import WaveIndex
from wavejax.store.state import WaveState

_WINDOW = "steady/window"
_ROWS, _SCALES = "store/rows/data", "store/rows/scales"


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
        InputError: a length is damaged, or the state has no room. The first step raises what is
            found in the index and the steady zone, and others what is found in rows.
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
        of_rows = [
            file
            for name, files in by_layer.items()
            if not (arriving and name == _ROWS)
            for file in files
        ]
        self._small, self._checks = list(small.values()), Checks([*small.values(), *of_rows])
        if length is not None:
            self._checks.wait(*self._small)
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
        check_room(folder, parts, kept, first)
        if rest > room_left(state, config, kept):
            raise no_room(f" and the {rest} tokens after it")
        self._work = collections.deque[Callable[[Any], Any]]([self._wait_for_small])
        groups: list[list[Maker]] = []
        for name, files in by_layer.items():
            self._plan_rows(name, files, first, staged and name == _ROWS, groups)
        self._plan_small(parts, kept, groups)
        devices = jax.tree.leaves(state)[0].devices()
        self._transfers = Transfers(next(iter(devices)) if len(devices) == 1 else None, groups)

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

    def close(self) -> None:
        """Do no more, and let go of what is on its way; of no effect after the last step."""
        self._work.clear()
        self._checks.cancel()
        self._transfers.cancel()

    def _wait_for_small(self, attention_state: Any) -> Any:
        self._checks.wait(*self._small)
        return attention_state

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
            rows, starts = row_pieces(file, tokens)
            mapped, heads = file.map(), range(file.shape[0])
            groups.append(
                [
                    functools.partial(_piece, mapped, head, start, rows)
                    for start in starts
                    for head in heads
                ]
            )
            self._work.append(functools.partial(self._put_layer, name, layer, file, starts))

    def _plan_small(
        self, parts: dict[str, Part], kept: dict[str, np.ndarray], groups: list[list[Maker]]
    ) -> None:
        """List the last step, which puts all but the rows, and what is brought for it."""
        numbers = {name: x for name, x in kept.items() if not parts[name].kept_axes}
        starts: dict[str, list[int]] = {}
        for name in [one for one in kept if one not in numbers]:
            part, array = parts[name], kept[name]
            layers, batch = part.array.shape[:2]
            count, starts[name] = layer_pieces(layers, part.array.nbytes // (layers * batch))
            make = functools.partial(arrays.padded, part, array, layers=count)
            groups.append([functools.partial(make, first=first) for first in starts[name]])
        self._work.append(functools.partial(self._put_small, starts, numbers))

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
        part = next(part for part in arrays.parts_of(attention_state) if part.name == name)
        for number, start in enumerate(starts):
            of_heads = pieces[number * heads : (number + 1) * heads]
            put = arrays.put_rows(part, self._slot, layer, start, of_heads)
            part = part._replace(array=put)
        state = _replaced(on_device_of(attention_state), {name: part.array})
        return with_device_part(attention_state, state)

    def _put_small(
        self, starts: dict[str, list[int]], numbers: dict[str, np.ndarray], attention_state: Any
    ) -> Any:
        """Put all but the rows; then the slot holds the sequence."""
        state = on_device_of(attention_state)
        parts = {part.name: part for part in arrays.parts_of(attention_state)}
        new: dict[str, Any] = {}
        for name, firsts in starts.items():
            part = parts[name]
            for first, block in zip(firsts, self._transfers.take(), strict=True):
                part = part._replace(array=arrays.put_layers(part, self._slot, first, block))
            new[name] = part.array
        for name, number in numbers.items():
            new[name] = arrays.put_number(parts[name], self._slot, number)
        state = _replaced(state, new)
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


def _piece(rows: np.ndarray, head: int, start: int, count: int) -> np.ndarray:
    """Take one head's rows from one on: a part of the mapped file."""
    return rows[head, start : start + count]
