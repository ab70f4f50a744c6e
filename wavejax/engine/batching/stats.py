"""What an engine has done, and does."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.request import FinishReason
from wavejax.engine.batching.slot_reading import SlotReading


@dataclasses.dataclass(frozen=True)
class Stats:
    """One moment's numbers: `submitted` is the sum of `finished`, waiting, reading and running.

    Attributes:
        submitted: requests that were taken.
        refused: requests that `submit` raised an error for.
        finished: of each finish reason, answers that ended by it.
        prompt_tokens: of all prompts that were read, or copied from one that was.
        generated_tokens: of all answers.
        waiting: requests in line.
        reading: requests whose prompts are being read.
        running: requests whose answers come.
        slots: of all rooms that have memory now.
        held_tokens: of prompts that are read or answered, and of their answers so far.
        token_room: that those slots have together, for prompts and answers.
        decode_calls: of the compiled step.
        read_parts: parts of prompts that were read.
        longest_stall_seconds: the longest that running answers waited from one call's tokens to the
            next one's, while prompts were read or not.
    """

    submitted: int
    refused: int
    finished: Mapping[FinishReason, int]
    prompt_tokens: int
    generated_tokens: int
    waiting: int
    reading: int
    running: int
    slots: int
    held_tokens: int
    token_room: int
    decode_calls: int
    read_parts: int
    longest_stall_seconds: float

    @property
    def usage(self) -> float:
        """The share of the slots' tokens that is in use, from 0 to 1."""
        return self.held_tokens / self.token_room if self.token_room else 0.0

    @property
    def unfinished(self) -> int:
        """How many requests were taken and have not ended: waiting, reading and running."""
        return self.waiting + self.reading + self.running


def held_by(
    batches: Sequence[Batch], readings: Iterable[SlotReading], running: Iterable[Answer]
) -> dict[str, int]:
    """Count slots that have memory, their tokens, and those in use; as fields of `Stats`."""
    rooms = [batch.room for batch in batches if batch.state]
    reading = sum(one.answer.prompt_tokens for one in readings)
    return {
        "slots": sum(room.slots for room in rooms),
        "token_room": sum(room.slots * room.tokens for room in rooms),
        "held_tokens": reading + sum(one.prompt_tokens + one.tokens for one in running),
    }
