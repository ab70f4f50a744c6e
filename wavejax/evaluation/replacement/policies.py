"""Replacement policies of a row cache, simulated on a trace: NumPy, all layers and heads at once.

A policy gives every unit (a row, or a group of rows) a priority; after each step the cache holds
those of the units it held or was just asked for whose priorities are highest. As in the kernels,
units found in the cache in a step stay for that step; what is missed is read once, and kept or not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

NEVER = -1


@runtime_checkable
class Policy(Protocol):
    """How units are ranked. Arrays are `[lanes, units]`; a lane is one layer's kv head."""

    def start(self, lanes: int, units: int) -> None:
        """Forgets everything."""

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Take in a step's use (bool) and give the priorities (float64); -inf is never kept.

        Args:
            step: rising.
            used: the units that this step asks for.
            held: the units in the cache as the step begins.
        """


class LeastRecentlyUsed:
    """Keeps what was used last: what the kernels do."""

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.last = np.full((lanes, units), NEVER, np.float64)

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        self.last[used] = step
        return self.last


class FirstIn:
    """Keeps what came last, used since or not."""

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.came = np.full((lanes, units), NEVER, np.float64)

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        self.came[used & ~held] = step
        return self.came


@dataclasses.dataclass
class SecondUse:
    """LRU-2 (O'Neil et al. 1993): keeps what was used last but one most recently.

    Units used once rank below all others, by their only use.
    """

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.last = np.full((lanes, units), NEVER, np.float64)
        self.before = np.full((lanes, units), -np.inf)

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        self.before[used] = np.where(self.last[used] < 0, -np.inf, self.last[used])
        self.last[used] = step
        return np.where(np.isfinite(self.before), self.before, self.last - 1e6)


@dataclasses.dataclass
class DecayedFrequency:
    """Keeps what was used most, each use counting `decay` times less with every step since.

    Attributes:
        decay: 1 counts all uses alike (LFU), towards 0 the last one alone (LRU).
        remembers: counts survive eviction; else a unit that comes back starts at one.
    """

    decay: float
    remembers: bool = True

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.count = np.zeros((lanes, units))

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        if not self.remembers:
            self.count[~held] = 0
        self.count *= self.decay
        self.count += used
        return self.count


@dataclasses.dataclass
class SecondChanceToEnter:
    """Admits a missed unit only if it was missed before within `window` steps; then ranks by `of`.

    Until the cache is full everything is admitted.
    """

    of: Policy
    window: int

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.of.start(lanes, units)
        self.missed = np.full((lanes, units), -np.inf)
        self.slots = 0

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        ranks = self.of.rank(step, used, held)
        missed = used & ~held
        new = missed & (step - self.missed > self.window)
        self.missed[missed] = step
        # Below all that is in the cache, but above nothing.
        return np.where(new, ranks - 1e9, ranks)


class Clock:
    """Second chance: a hand goes round the slots and takes the first not used since it last came.

    Not by priorities: `simulate` asks it for the cache itself.
    """

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""
        self.units = units
        self.owner: np.ndarray | None = None

    def keep(self, used: np.ndarray, held: np.ndarray, slots: int) -> np.ndarray:
        """Return the cache after a step: bool, like `held`."""
        lanes = len(used)
        if self.owner is None:
            self.owner = np.full((lanes, slots), NEVER)
            self.marked = np.zeros((lanes, slots), bool)
            self.hand = np.zeros(lanes, int)
        held = held.copy()
        for lane in range(lanes):
            owner, marked = self.owner[lane], self.marked[lane]
            filled = owner >= 0
            hit = np.zeros(slots, bool)
            hit[filled] = used[lane, owner[filled]]
            marked |= hit
            free = slots - int(hit.sum())
            for unit in np.flatnonzero(used[lane] & ~held[lane])[:free]:
                hand = self.hand[lane]
                while hit[hand] or marked[hand]:
                    # A slot of this step's own rows is passed over and keeps its mark.
                    marked[hand] &= hit[hand]
                    hand = (hand + 1) % slots
                if owner[hand] >= 0:
                    held[lane, owner[hand]] = False
                owner[hand], held[lane, unit] = unit, True
                hit[hand] = marked[hand] = True
                self.hand[lane] = (hand + 1) % slots
        return held


class Optimum:
    """Belady's: keeps what is used again soonest. No policy misses less; none can know."""

    def __init__(self, next_use: Callable[[int], np.ndarray]):
        self.next_use = next_use

    def start(self, lanes: int, units: int) -> None:
        """See `Policy`."""

    def rank(self, step: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        """See `Policy`."""
        return -self.next_use(step)


def policies() -> dict[str, Callable[[], Any]]:
    """Return the policies compared, by name."""
    return {
        "LRU": LeastRecentlyUsed,
        "FIFO": FirstIn,
        "CLOCK": Clock,
        "LRU-2": SecondUse,
        "LFU": lambda: DecayedFrequency(1.0),
        "frequency, decay 0.98": lambda: DecayedFrequency(0.98),
        "frequency, decay 0.95": lambda: DecayedFrequency(0.95),
        "frequency, decay 0.9": lambda: DecayedFrequency(0.9),
        "frequency, decay 0.8": lambda: DecayedFrequency(0.8),
        "the same, in the cache only": lambda: DecayedFrequency(0.95, remembers=False),
        "LRU, in at the second miss": lambda: SecondChanceToEnter(LeastRecentlyUsed(), 64),
    }
