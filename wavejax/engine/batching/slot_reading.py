"""What all ways to fill a slot for an answer have in common: parts, their errors, and the end."""

import abc
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch


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

    def __init__(self, batch: Batch, slot: int, answer: Answer):
        self.batch, self.slot, self.answer = batch, slot, answer
        self.error: Exception | None = None
        self.done = False
        batch.kept.add(slot)

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
        self.done = True
