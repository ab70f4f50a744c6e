"""A prompt that begins with what was read before: that is restored, and the rest is appended."""

import dataclasses
from typing import Any

import numpy as np

from wavejax.engine.batching.admission import reused_by
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.reading import park
from wavejax.engine.batching.request import Restorable
from wavejax.engine.batching.slot_reading import AppendedReading, Part
from wavejax.engine.prompts import bucket
from wavejax.engine.state import commit


class KeptReading(AppendedReading):
    """Restores what a request's prompt begins with, and reads the rest.

    The slot is parked until the last step of restoring, so that others are decoded meanwhile.

    Args:
        batch, slot: as of `SlotReading`.
        answer: whose request has `kept`.
    """

    def __init__(self, batch: Batch, slot: int, answer: Answer):
        super().__init__(batch, slot, answer, reused_by(answer.request))
        self._restoring: Restorable | None = None

    def abandon(self) -> None:
        """See `SlotReading.abandon`; what is on its way to the device is let go of."""
        super().abandon()
        if self._restoring is not None:
            self._restoring.close()

    def part(self) -> Part:
        """Say what comes next."""
        room = self.batch.room
        if self._restoring is None:
            return Part(("restore", room), 1)
        left = self._restoring.steps
        if left > 1:
            return Part(("restore rows", room, bucket(self._reused)), left - 1)
        if left == 1:
            return Part(("restore index", room, bucket(self._reused)), 1)
        return super().part()

    def _run(self, units: int) -> Any:
        if self._restoring is None:
            return self._begin()
        if self._restoring.steps:
            return self._restore(self._restoring, units)
        return self._append() if self._read < len(self._prompt) else self._begin_answer()

    def _begin(self) -> Any:
        batch, kept = self.batch, self.answer.request.kept
        assert kept is not None
        engine, state = batch.engine, batch.whole_state
        # First what may be refused, while nothing has been donated.
        self._restoring = kept.restoring(engine, state.attention_state, self.slot, self._prompt)
        where = np.int32(self.slot), np.int32(len(self._prompt))
        return self._hold(park(engine, state.attention_state, *where))

    def _restore(self, restoring: Restorable, units: int) -> Any:
        held = None
        for _ in range(units):
            held = self._hold(restoring.step(self.batch.whole_state.attention_state))
        if not restoring.steps:
            self._tell_reused()
        return held

    def _begin_answer(self) -> Any:
        """Begin the answer of a prompt that is kept whole."""
        batch, kept = self.batch, self.answer.request.kept
        assert kept is not None
        logits = commit(batch.whole_state.logits.at[self.slot].set(kept.last_logits()))
        batch.state = dataclasses.replace(batch.whole_state, logits=logits)
        self._seat()
        return logits
