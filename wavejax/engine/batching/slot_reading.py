"""What all ways to fill a slot for an answer have in common: parts, their errors, and the end."""

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from wavejax.engine import appending
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.prompts import bucket


class Part(NamedTuple):
    """The work that comes next.

    Attributes:
        key: the kind; parts of one kind take about as long a unit.
        units: the most that one run may do.
    """

    key: Hashable
    units: int


class SlotReading(abc.ABC):
    """Reads one prompt into a slot, part by part.

    Args:
        batch: whose slot; it keeps it until the answer is seated, or `abandon`.
        slot: a free one.
        answer: whose prompt.
    """

    # Whether the slot has room for this answer, and not for the longest of its room.
    continued = False
    # Whether nobody else is read or waits: the next step's tokens are then drawn at once.
    alone = False

    def __init__(self, batch: Batch, slot: int, answer: Answer):
        self.batch, self.slot, self.answer = batch, slot, answer
        self.error: Exception | None = None
        self.done = False
        batch.keep(slot)

    def prepare(self) -> None:  # noqa: B027 (most have nothing to prepare)
        """Do what cannot wait for the first part's turn."""

    @abc.abstractmethod
    def part(self) -> Part:
        """Say what comes next."""

    def run(self, units: int) -> None:
        """Do so many units of `part`, and waits for them. `error` has what goes wrong."""
        try:
            jax.block_until_ready(self._run(units))
        except Exception as error:  # of this prompt: the engine ends its answer
            self.error = error
            self.abandon()

    @abc.abstractmethod
    def _run(self, units: int) -> Any:
        """Do so many units of `part`; return what to wait for."""

    def abandon(self) -> None:
        """Leave the slot: free at once. What was written is written over by the next prompt."""
        self.batch.kept.discard(self.slot)
        self.done = True

    def _seat(self) -> None:
        """Let the answer begin, in a slot that has been filled."""
        self.batch.seat(self.slot, self.answer)
        if self.alone:
            self.batch.draw_behind()
        self.done = True


class AppendedReading(SlotReading):
    """Appends the rest of a prompt to what its slot holds, as `Generator.append` does.

    The slot holds a sequence that has ended: a decode step writes one row after it, which the next
    tokens take the place of. A piece of them runs through all layers in one part.

    Args:
        batch, slot: as of `SlotReading`.
        answer: whose prompt.
        reused: tokens of the prompt that are not read anew.
    """

    def __init__(self, batch: Batch, slot: int, answer: Answer, reused: int):
        super().__init__(batch, slot, answer)
        prompt: Any = answer.request.prompt
        self._prompt: np.ndarray = prompt
        self._reused = self._read = reused
        self._free = 0  # Tokens that may be appended at once, as far as is known.

    def part(self) -> Part:
        """Say what comes next: a piece of the rest."""
        left = len(self._prompt) - self._read
        count = appending.piece_tokens(self.batch.engine, left)
        sizes = bucket(self._read), appending.padded_piece(count) if count else 0
        return Part(("append", self.batch.room, *sizes), 1)

    def _append(self) -> Any:
        """Read a piece; the answer begins with the last one."""
        batch = self.batch
        state = batch.whole_state
        given = state.attention_state, state.logits, self.slot, self._prompt[self._read :]
        held, logits, count = appending.append_some(
            batch.engine, batch.params, *given, free=self._free
        )
        self._free = max(0, self._free - count)
        batch.state = dataclasses.replace(state, attention_state=held, logits=logits)
        self._read += count
        self.answer.tell(self._read)
        if self._read == len(self._prompt):
            self._seat()
        return logits

    def _tell_reused(self) -> None:
        """Say that what is reused is there."""
        self.answer.cached = self._reused
        self.answer.tell(self._reused)

    def _hold(self, attention_state: Any) -> Any:
        """Go on with a new attention state; return what to wait for."""
        batch = self.batch
        batch.state = dataclasses.replace(batch.whole_state, attention_state=attention_state)
        return batch.engine.arrays_of(attention_state)
