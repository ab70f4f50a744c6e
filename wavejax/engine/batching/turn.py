"""How much of the prompts is read between two calls of the step."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from wavejax.engine.batching.pace import Pace
from wavejax.engine.batching.slot_reading import Part


@runtime_checkable
class Readable(Protocol):
    """What is read part by part, as `Reading`."""

    @property
    def done(self) -> bool:
        """Whether there is nothing left to read."""

    def part(self) -> Part:
        """Say what comes next."""

    def run(self, units: int) -> None:
        """Do so many units of it, and waits for them."""


def read_some(
    reading: Readable,
    until: float,
    pace: Pace,
    clock: Callable[[], float],
    *,
    at_least_one: bool = True,
) -> int:
    """Read parts of a prompt until the time is up, as measured parts say.

    Args:
        reading: the prompt.
        until: by the clock; no part is begun that would end after it.
        pace: learns of each part.
        clock: seconds.
        at_least_one: whether one unit is done even if it does not fit: else a prompt whose
            smallest part takes longer than there is time would never be read.

    Returns:
        the number of parts.
    """
    parts = 0
    while not reading.done:
        part, now = reading.part(), clock()
        units = pace.units(part.key, until - now, part.units)
        if pace.seconds(part.key) is None and now >= until:
            units = 0
        if units == 0:
            if parts or not at_least_one:
                break
            units = 1
        reading.run(units)
        pace.note(part.key, units, clock() - now)
        parts += 1
    return parts


def read_all(
    readings: Sequence[Readable], seconds: float, pace: Pace, clock: Callable[[], float]
) -> int:
    """Read of several prompts, in equal shares of the time.

    What one leaves of its share is the next one's; the last one's is the first one's again.

    Args:
        readings: the prompts. The first one is sure of a part: let them take turns.
        seconds: for all together.
        pace, clock: as of `read_some`.

    Returns:
        the number of parts. At least one is read, of one prompt, whatever it takes.
    """
    start, parts = clock(), 0
    waiting = [one for one in readings if not one.done]
    for number, reading in enumerate(waiting, 1):
        share = start + seconds * number / len(waiting)
        parts += read_some(reading, share, pace, clock, at_least_one=parts == 0)
    for reading in waiting:
        parts += read_some(reading, start + seconds, pace, clock, at_least_one=False)
    return parts
