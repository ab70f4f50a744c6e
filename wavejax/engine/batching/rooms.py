"""Rooms: how long prompts and answers may be, and how many slots there are for such."""

import dataclasses
from collections.abc import Sequence

from models.errors import InputError
from wavejax.engine.checks import MOST_INT32, whole_number
from wavejax.engine.prompts import answer_room, bucket


@dataclasses.dataclass(frozen=True)
class Room:
    """Slots of one size: one state, and so one set of compiled programs.

    Attributes:
        prompt_tokens: of the longest prompt; rounded up (`prompts.bucket`).
        new_tokens: most tokens that are generated; rounded up (`prompts.answer_room`).
        slots: sequences side by side.
        bytes: that its state takes; 0: not known, and never too much.

    Raises:
        InputError: a number is no whole one, or out of range.
    """

    prompt_tokens: int
    new_tokens: int
    slots: int
    bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "slots"):
            whole_number(f"a room's {name}", getattr(self, name), 1, MOST_INT32)
        whole_number("a room's bytes", self.bytes, 0)
        object.__setattr__(self, "prompt_tokens", bucket(self.prompt_tokens))
        object.__setattr__(self, "new_tokens", answer_room(self.new_tokens))

    @property
    def tokens(self) -> int:
        """Of a slot: prompt and answer."""
        return self.prompt_tokens + self.new_tokens

    def holds(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether a request fits a slot."""
        return bucket(prompt_tokens) <= self.prompt_tokens and new_tokens <= self.new_tokens


def as_rooms(rooms: Sequence[Room]) -> tuple[Room, ...]:
    """Return the rooms, the smallest first.

    Raises:
        InputError: there is none, or one is no `Room`.
    """
    for room in rooms:
        if not isinstance(room, Room):
            raise InputError(f"a room is of type {type(room).__name__}; give a Room")
    if not rooms:
        raise InputError("there is no room: give at least one")
    return tuple(sorted(rooms, key=lambda room: (room.prompt_tokens, room.new_tokens)))


def check_context(context: int, prompt_tokens: int, new_tokens: int) -> None:
    """Raise InputError, with both numbers, for a request of more tokens than a context has."""
    needed = prompt_tokens + new_tokens
    if needed > context:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, {needed} with {new_tokens} new ones; the "
            f"context is {context} tokens: shorten the prompt, or lower `max_new_tokens`"
        )


def check_fits(
    rooms: Sequence[Room], memory: int | None, prompt_tokens: int, new_tokens: int
) -> None:
    """Whether a request fits any room that there can be.

    Args:
        rooms: of the engine.
        memory: bytes that rooms may take; None: any number.
        prompt_tokens: of its prompt.
        new_tokens: the most that it wants.

    Raises:
        InputError: none holds it, or none that does fits the memory; with both numbers.
    """
    fitting = [room for room in rooms if room.holds(prompt_tokens, new_tokens)]
    if not fitting:
        longest = max(room.prompt_tokens for room in rooms)
        if bucket(prompt_tokens) > longest:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens, and there is room for {longest}: shorten "
                "it, or give the engine a larger room"
            )
        most = max(room.new_tokens for room in rooms if bucket(prompt_tokens) <= room.prompt_tokens)
        raise InputError(
            f"`max_new_tokens` is {new_tokens}, and beside a prompt of {prompt_tokens} tokens "
            f"there is room for {most}: lower it, or give the engine a larger room"
        )
    least = min(room.bytes for room in fitting)
    if memory is not None and least > memory:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens with {new_tokens} new ones needs a room of "
            f"{least / 2**30:.2f} GiB, and there are {memory / 2**30:.2f} GiB for rooms: shorten "
            "it, or give the engine fewer slots"
        )
