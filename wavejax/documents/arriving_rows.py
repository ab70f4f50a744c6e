"""Rows on the host that are still on their way from a file: steps need not wait for them."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Int, Num

from pallas_kernels.types import NO_ID
from wavejax.documents.stored_arrays import StoredArray
from wavejax.store.host_rows import HostRows


class Arrival:
    """A kept sequence's rows as they come: checked and copied by a thread, layer after layer.

    Args:
        rows: where to, `[layers, batch, kv_heads, room, 2, head_dim]`.
        slot: whose place.
        files: of each layer's rows, `[kv_heads, tokens, 2, head_dim]`.

    Raises:
        InputError: a file is missing or truncated. A byte that is not what was written is found
            later: `check` raises it.
    """

    def __init__(self, rows: np.ndarray, slot: int, files: Sequence[StoredArray]):
        self.slot = slot
        self._rows, self._files = rows, files
        self._mapped = [file.map() for file in files]
        self._done = [threading.Event() for _ in files]
        self._error: BaseException | None = None
        threading.Thread(target=self._copy, name="rows of a document", daemon=True).start()

    def _copy(self) -> None:
        try:
            for layer, (file, mapped) in enumerate(zip(self._files, self._mapped, strict=True)):
                file.check()
                self._rows[layer, self.slot, :, : mapped.shape[1]] = mapped
                self._done[layer].set()
        except BaseException as error:
            self._error = error
            for done in self._done:
                done.set()

    @property
    def ended(self) -> bool:
        """Whether all rows are there, and checked."""
        return self._error is None and all(done.is_set() for done in self._done)

    def check(self) -> None:
        """Raise InputError where a layer's rows turned out not to be what was written."""
        if self._error is not None:
            raise self._error

    def wait(self, layer: int) -> None:
        """Wait until a layer's rows are there; raises InputError as `check` does."""
        self._done[layer].wait()
        self.check()

    def fill(
        self,
        layer: int,
        tokens: Int[np.ndarray, "kv_heads width"],
        block: Num[np.ndarray, "kv_heads width 2 head_dim"],
    ) -> None:
        """Take from the file what of a block has not arrived: of rows that are the document's."""
        self.check()
        if self._done[layer].is_set():
            self.check()
            return
        mapped = self._mapped[layer]
        head, place = np.nonzero((tokens != NO_ID) & (tokens < mapped.shape[1]))
        block[head, place] = mapped[head, tokens[head, place]]


class ArrivingRows(HostRows):
    """Host rows of which some slots' still arrive; else as `HostRows`, whose arrays it takes over.

    Rows that a step reads before their layer has arrived come from the mapped file itself. They are
    checked when the layer is: the next step then raises what was found.

    Args:
        held: the rows so far; not to be used any more.
    """

    def __init__(self, held: HostRows):
        self.__dict__.update(held.__dict__)
        self._arrivals: list[Arrival] = list(getattr(held, "_arrivals", ()))

    def receive(self, slot: int, files: Sequence[StoredArray]) -> None:
        """Have a slot's rows come from files; see `Arrival`."""
        self.take_in()  # what was put into the slot before
        self.settle(slot)
        self._arrivals.append(Arrival(self.rows, slot, files))

    def settle(self, slot: int | None = None) -> None:
        """Wait for all rows, or a slot's; raises InputError where a file was damaged."""
        for arrival in self._arrivals:
            if slot is None or arrival.slot == slot:
                for layer in range(self.rows.shape[0]):
                    arrival.wait(layer)
        self._arrivals = [one for one in self._arrivals if not one.ended]

    def put(self, where: tuple[Any, ...], rows: Array) -> None:
        """See `HostRows.put`. A prompt read into a slot waits for what still arrives there."""
        if isinstance(where[3], slice) and not where[3].start:
            self.settle(where[1])
        super().put(where, rows)

    def of(self, layer: int, sequence: int) -> Num[np.ndarray, "kv_heads tokens 2 head_dim"]:
        """See `HostRows.of`; waits for the layer's rows, and no other's."""
        for arrival in self._arrivals:
            if arrival.slot == sequence:
                arrival.wait(layer)
        return super().of(layer, sequence)

    def gather(
        self, layer: int, tokens: Int[np.ndarray, "batch kv_heads missed"]
    ) -> Num[np.ndarray, "batch kv_heads width 2 head_dim"]:
        """See `HostRows.gather`."""
        self._arrivals = [one for one in self._arrivals if not one.ended]
        block = super().gather(layer, tokens)
        for arrival in self._arrivals:
            width = block.shape[2]
            arrival.fill(layer, tokens[arrival.slot, :, :width], block[arrival.slot])
        return block
