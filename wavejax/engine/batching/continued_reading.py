"""A prompt that begins with what a free slot still holds: that is cut to it, and the rest appended.

A chat's next turn begins with the last one's prompt and answer, and a second question to a text
with the text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from wavejax.attention import appended
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.slot_reading import AppendedReading
from wavejax.engine.staged_state import on_device_of, with_device_part


class ContinuedReading(AppendedReading):
    """Goes on in a slot from what it holds.

    Args:
        batch: as of `SlotReading`.
        slot: one of `batch.ended`.
        answer: whose prompt begins with what the slot holds.
        reused: tokens of the prompt that are not read anew.
        free: tokens that may be appended to them before the state has to grow.
    """

    continued = True

    def __init__(self, batch: Batch, slot: int, answer: Answer, reused: int, free: int):
        super().__init__(batch, slot, answer, reused)
        self._free = free

    def prepare(self) -> None:
        """Cut what the slot holds: a step before it could grow what is to be cut."""
        cut_slot(self.batch, self.slot, self._reused)
        self._tell_reused()

    def _run(self, units: int) -> Any:
        return self._append()


def wait_for_ended(batches: Sequence[Batch]) -> list[tuple[Batch, Exception]]:
    """Wait for the calls that answers were in whose slots are free; list where one failed."""
    failed: list[tuple[Batch, Exception]] = []
    for batch in batches:
        try:
            for held in batch.ended.values():
                held.wait()
        except Exception as error:  # of a call: whatever the device says
            failed.append((batch, error))
    return failed


def slot_to_continue(batches: Sequence[Batch], answer: Answer) -> tuple[int, Batch, int] | None:
    """Find the free slot from which the most tokens of a prompt are reused; None if there is none.

    The smallest room's of several.

    Returns:
        how many tokens need not be read, the room's batch, and the slot.
    """
    found: list[tuple[int, Batch, int]] = [
        (held.reused(answer.request), batch, slot)
        for batch in batches
        for slot, held in batch.ended.items()
    ]
    best = max(found, key=lambda one: one[0], default=None)
    return best if best is not None and best[0] else None


def cut_slot(batch: Batch, slot: int, tokens: int) -> None:
    """Leave a slot the first tokens of what it holds."""
    state = batch.whole_state
    held = state.attention_state
    arrays = appended.cut(on_device_of(held), slot, tokens)
    new = with_device_part(held, arrays)
    batch.state = dataclasses.replace(state, attention_state=new)
