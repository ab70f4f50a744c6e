"""The line of requests that wait, and who goes next."""

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.request import QueueFull

T = TypeVar("T")
Blocked = Literal["reading", "room"]
"""Why a request cannot go now: a prompt of its kind is being read, or no slot is free."""


class Line:
    """Requests that wait, in the order in which they came; at most `limit`.

    The rule of who goes next:

    1. The first in line goes, if it can.
    2. If it cannot, the first *short* request behind it goes that can. It passes those before it.
    3. A pass counts against those that it passes and that waited for a slot or for memory alone:
       the first in line, and short ones. It does not count where another prompt is being read
       meanwhile. Who was passed `most_passes` times so is passed no more: nobody behind goes
       before it does.

    So a short request does not wait for long prompts to be read, and a long one waits for at most
    `most_passes` short ones that came later.

    Args:
        limit: the most that wait.
        most_passes: see the rule; 0 is strictly first come, first served.
    """

    def __init__(self, limit: int, most_passes: int):
        self._limit, self._most_passes = limit, most_passes
        self._waiting: list[Answer] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Answer]:
        return iter(tuple(self._waiting))

    def push(self, answer: Answer) -> None:
        """Put a request at the end of the line.

        Raises:
            QueueFull: there is no place left.
        """
        wanted = sum(not one.channel.cancelled for one in self._waiting)
        if wanted >= self._limit:
            raise QueueFull(wanted, self._limit)
        self._waiting.append(answer)

    def remove(self, answer: Answer) -> None:
        """Take a request out of the line, wherever it stands."""
        self._waiting.remove(answer)

    def take(self, place: Callable[[Answer], T | Blocked]) -> tuple[Answer, T] | None:
        """Take the request that goes next; None if none can go.

        Args:
            place: finds a request its place, or says why it has none now. It is called for each
                request that may go, until one has a place.
        """
        passed: list[Answer] = []
        for number, answer in enumerate(self._waiting):
            if number and not answer.short:
                continue
            found = place(answer)
            if found == "room":
                if answer.passed >= self._most_passes:
                    return None
                passed.append(answer)
            elif found != "reading":
                for before in passed:
                    before.passed += 1
                self._waiting.remove(answer)
                return answer, found  # type: ignore[return-value]
        return None
