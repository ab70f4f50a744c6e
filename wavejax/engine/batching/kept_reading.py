"""A prompt that begins with what was read before: that is restored, and the rest is appended."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavejax.engine import appending
from wavejax.engine.batching.admission import reused_by
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.reading import park
from wavejax.engine.batching.request import Restorable
from wavejax.engine.batching.slot_reading import Part, SlotReading
from wavejax.engine.prompts import bucket
from wavejax.engine.state import commit


class KeptReading(SlotReading):
    """Restores what a request's prompt begins with, and reads the rest, as `Generator.append` does.

    The slot is parked until the last step of restoring, so that others are decoded meanwhile. From
    then on it holds a sequence that has ended: a decode step writes one row after it, which the
    next tokens take the place of. A piece of them runs through all layers in one part.

    Args:
        batch, slot: as of `SlotReading`.
        answer: whose request has `kept`.
    """

    def __init__(self, batch: Batch, slot: int, answer: Answer):
        super().__init__(batch, slot, answer)
        prompt: Any = answer.request.prompt
        self._prompt: np.ndarray = prompt
        self._reused = self._read = reused_by(answer.request)
        self._restoring: Restorable | None = None

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
        count = min(appending.PIECE, len(self._prompt) - self._read)
        return Part(("append", room, bucket(self._read), bucket(count) if count else 0), 1)

    def _run(self, units: int) -> Any:
        if self._restoring is None:
            return self._begin()
        if self._restoring.steps:
            return self._restore(self._restoring, units)
        return self._append()

    def _begin(self) -> Any:
        batch, kept = self.batch, self.answer.request.kept
        assert kept is not None
        engine, state = batch.engine, batch.whole_state
        # First what may be refused, while nothing has been donated.
        self._restoring = kept.restoring(engine, state.attention_state, self.slot, self._prompt)
        where = jnp.int32(self.slot), jnp.int32(len(self._prompt))
        return self._hold(park(engine, state.attention_state, *where))

    def _restore(self, restoring: Restorable, units: int) -> Any:
        held = None
        for _ in range(units):
            held = self._hold(restoring.step(self.batch.whole_state.attention_state))
        if not restoring.steps:
            self.answer.cached = self._reused
            self.answer.tell(self._reused)
        return held

    def _append(self) -> Any:
        """Read a piece of the rest; the answer begins with the last one."""
        batch, rest = self.batch, self._prompt[self._read :]
        engine, state = batch.engine, batch.whole_state
        if rest.size:
            given = state.attention_state, state.logits, self.slot, rest
            held, logits, count = appending.append_some(engine, batch.params, *given)
            batch.state = dataclasses.replace(state, attention_state=held, logits=logits)
            self._read += count
            self.answer.tell(self._read)
        else:
            kept = self.answer.request.kept
            assert kept is not None
            logits = commit(state.logits.at[self.slot].set(kept.last_logits()))
            batch.state = dataclasses.replace(state, logits=logits)
        if self._read == len(self._prompt):
            self._seat()
        return logits

    def _hold(self, attention_state: Any) -> Any:
        """Go on with a new attention state; return what to wait for."""
        batch = self.batch
        batch.state = dataclasses.replace(batch.whole_state, attention_state=attention_state)
        return batch.engine.arrays_of(attention_state)
