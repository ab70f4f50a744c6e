"""Runs a trace through a simulated row cache and counts what it would have read."""

import dataclasses
from typing import Any, Literal

import numpy as np

from wavejax.evaluation.replacement.policies import Clock, Optimum
from wavejax.evaluation.replacement.trace import NO_ROW, Trace

# Of host memory: rows so near each other share a translation of addresses (docs/lab/host-rows.md).
PAGE_BYTES = 65536
Order = Literal["token", "cluster"]


@dataclasses.dataclass(frozen=True)
class Reads:
    """What was read from the store, a step and head on average.

    Attributes:
        wanted: rows retrieved.
        missed: rows of them not in the cache: what attention waits for.
        read: rows read: whole units.
        pages: distinct pages of the host's memory that these lie in.
    """

    wanted: float
    missed: float
    read: float
    pages: float


class Uses:
    """A trace's uses of units, compact: only the units that are ever used, lane by lane.

    Units are `size` neighbouring rows, in the order of the tokens or of the clusters.

    Attributes:
        rows: `[steps, lanes, units]` uint8, how many rows of each unit a step asks for.
        pages: `[lanes, units, 2]` int32, the first and last page of each unit: of `page_bytes`, in
            a store whose rows take `row_bytes`.
    """

    def __init__(
        self,
        trace: Trace,
        size: int,
        order: Order,
        row_bytes: int,
        page_bytes: int = PAGE_BYTES,
    ):
        steps = trace.rows.shape[0]
        tokens = trace.order.shape[-1]
        lanes = trace.rows.reshape(steps, -1, trace.rows.shape[-1]).swapaxes(0, 1)
        place = np.broadcast_to(np.arange(tokens), (len(lanes), tokens))
        if order == "cluster":
            # The inverse: where each token stands among its head's clusters.
            place = np.argsort(trace.order.reshape(-1, tokens), axis=-1)
        found = []
        for rows, places in zip(lanes, place, strict=True):
            step, nth = np.nonzero(rows != NO_ROW)
            unit = places[rows[step, nth]] // size
            found.append((step, *np.unique(unit, return_inverse=True)))
        most = max(len(units) for _, units, _ in found)
        self.rows = np.zeros((steps, len(lanes), most), np.uint8)
        self.pages = np.zeros((len(lanes), most, 2), np.int32)
        for lane, (step, units, compact) in enumerate(found):
            counts = self.rows[:, lane]
            np.add.at(counts, (step, compact), 1)  # into `self.rows`: a view
            start = units * size * row_bytes
            self.pages[lane, : len(units), 0] = start // page_bytes
            last = (start + size * row_bytes - 1) // page_bytes
            self.pages[lane, : len(units), 1] = last
        self.size = size
        self.tokens = tokens

    def next_use(self, step: int) -> np.ndarray:
        """`[lanes, units]` float64: the next step after this one that uses each; inf for none."""
        if not hasattr(self, "_next"):
            steps = len(self.rows)
            later = np.full(self.rows.shape[1:], np.inf)
            self._next = np.empty(self.rows.shape, np.float32)
            for i in range(steps - 1, -1, -1):
                self._next[i] = later
                later[self.rows[i] > 0] = i
        return self._next[step].astype(np.float64)

    def count_pages(self, units: np.ndarray) -> int:
        """Distinct pages that the marked units (bool `[lanes, units]`) lie in, over all lanes."""
        lane, unit = np.nonzero(units)
        first, last = self.pages[lane, unit].T
        span = int((last - first).max(initial=0)) + 1
        touched = first[:, None] + np.arange(span)
        keep = touched <= last[:, None]
        lanes = np.broadcast_to(lane[:, None], touched.shape)
        return len(np.unique(lanes[keep] * 2**31 + touched[keep]))


def simulate(uses: Uses, policy: Any, slots: int, warm_up: int) -> Reads:
    """Run the steps through a cache of `slots` units a lane; count those after `warm_up`.

    Args:
        uses: of the trace's units.
        policy: one of `wavejax.evaluation.replacement.policies`, or "optimum" for Belady's bound.
        slots: units that each lane's cache holds.
        warm_up: steps at the start that fill the cache and are not counted.
    """
    steps, lanes, units = uses.rows.shape
    if policy == "optimum":
        policy = Optimum(uses.next_use)
    policy.start(lanes, units)
    held = np.zeros((lanes, units), bool)
    wanted = missed = read = pages = 0
    for step in range(steps):
        rows = uses.rows[step]
        used = rows > 0
        miss = used & ~held
        if step >= warm_up:
            wanted += int(rows.sum())
            missed += int(rows[miss].sum())
            read += uses.size * int(miss.sum())
            pages += uses.count_pages(miss)
        if isinstance(policy, Clock):
            held = policy.keep(used, held, slots)
            continue
        ranks = policy.rank(step, used, held)
        # What was found is being read: it cannot give way in this step. The bound knows no such
        # rule, so that it bounds every policy.
        hit = used & held & (not isinstance(policy, Optimum))
        held = keep_best(np.where(hit, np.inf, ranks), used | held, slots)
    counted = (steps - warm_up) * lanes
    return Reads(wanted / counted, missed / counted, read / counted, pages / counted)


def keep_best(ranks: np.ndarray, candidates: np.ndarray, slots: int) -> np.ndarray:
    """Mark the `slots` candidates of highest rank in each lane, ties to the lower unit."""
    if slots >= ranks.shape[1]:
        return candidates
    ranks = np.where(candidates, ranks, -np.inf)
    least = -np.partition(-ranks, slots - 1, axis=1)[:, slots - 1 : slots]
    above, tied = ranks > least, ranks == least
    room = slots - above.sum(axis=1, keepdims=True)
    return candidates & (above | (tied & (np.cumsum(tied, axis=1) <= room)))
