"""Which slot a request takes, and which rooms have memory."""

from collections.abc import Sequence
from typing import Literal

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.continued_reading import slot_to_continue

Place = tuple[Batch, int]


class Placing:
    """Finds slots in rooms, and gives rooms memory.

    Args:
        batches: of all rooms, smaller ones first.
        memory: bytes for all rooms together; None for no limit.
    """

    def __init__(self, batches: Sequence[Batch], memory: int | None):
        self._batches, self._memory = batches, memory

    def place(self, answer: Answer) -> Place | Literal["room"]:
        """Find the smallest room's slot that holds a request; "room" if there is none now.

        Before all others one that holds what its prompt begins with.
        """
        continued = slot_to_continue(self._batches, answer)
        if continued is not None:
            _, batch, slot = continued
            return batch, slot
        for batch in self._batches:
            if not batch.room.holds(*answer.room):
                continue
            free = batch.free_slots()
            if free and (batch.state is not None or self._fits(batch)):
                return batch, free[0]
        return "room"

    def _fits(self, batch: Batch) -> bool:
        """Whether a room can have memory, if those that are idle give theirs back."""
        if self._memory is None:
            return True
        held = sum(one.room.bytes for one in self._batches if one.state and not one.idle)
        return held + batch.room.bytes <= self._memory

    def allocate(self, batch: Batch) -> None:
        """Give a room its memory, if it has none; idle rooms may lose theirs."""
        if batch.state is not None:
            return
        for other in self._batches:
            held = sum(one.room.bytes for one in self._batches if one.state)
            if self._memory is None or held + batch.room.bytes <= self._memory:
                break
            if other.state is not None and other.idle:
                other.drop()
        batch.allocate()
