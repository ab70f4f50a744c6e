"""The adaptive mode beside fixed budgets, made of what a probe measured."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from wavejax.evaluation.summary import table
from wavejax.evaluation.tolerance_probe import Measured

QUANTILES = (0.5, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class Mode:
    """How one mode retrieves on some steps, and what error that leaves.

    Attributes:
        error: of each query head's output, relative; flat.
        rows: tokens retrieved that the output rests on, of each kv head; flat.
        read: tokens read in all: those of earlier turns and drawn ones too; flat. By true errors,
            which nobody knows, as `rows`.
        capped: the share of the query heads that are not within the tolerance in the end.
    """

    error: np.ndarray
    rows: np.ndarray
    read: np.ndarray
    capped: float

    @classmethod
    def joined(cls, parts: Sequence["Mode"]) -> "Mode":
        """Join the modes of several samples, each head weighing the same."""
        error, rows, read = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("error", "rows", "read")
        )
        heads = [part.error.size for part in parts]
        return cls(error, rows, read, float(np.average([p.capped for p in parts], weights=heads)))


def adaptive(found: Measured, place: int, tolerance: float, draws: int) -> Mode:
    """Return the mode that keeps a tolerance.

    Args:
        found: of a sample.
        place: which case it is.
        tolerance: the relative error to keep within.
        draws: tokens drawn in each kv head and turn.
    """
    error, bound = found.error[:, place].ravel(), found.bound[:, place]
    read = found.retrieved[:, place] + draws * found.turns[:, place]
    # A NaN is not within.
    inside = bound <= tolerance
    return Mode(error, found.rows[:, place].ravel(), read.ravel(), float(1 - inside.mean()))


def by_truth(found: Measured, places: Sequence[int], tolerance: float) -> Mode:
    """Return the mode that retrieves what true errors ask for: no bound can do better.

    Args:
        found: of a sample.
        places: of the cases that a head goes through, one after another, until it is within.
        tolerance: the relative error to keep within.
    """
    error, rows = found.error[:, list(places)], found.rows[:, list(places)]
    past = np.any(error > tolerance, axis=-1)
    turn = np.zeros(past.shape[:1] + past.shape[2:], int)
    for step in range(len(places) - 1):
        turn += (turn == step) & past[:, step]
    error, rows = _at(error, turn), _at(rows[..., None], turn)[..., 0]
    return Mode(error.ravel(), rows.ravel(), rows.ravel(), float(np.mean(error > tolerance)))


def fixed(found: Measured, place: int) -> Mode:
    """Return the mode that retrieves the same budget in all heads, by the place of its case."""
    error, rows = found.error[:, place].ravel(), found.rows[:, place].ravel()
    return Mode(error, rows, rows, 0.0)


def row_of(name: str, mode: Mode, tolerance: float, kl: float | None) -> list[str]:
    """Make a line of `report`: means, quantiles, shares."""
    kept = mode.error[np.isfinite(mode.error)]
    return [
        *(name, f"{mode.rows.mean():.1f}", f"{mode.read.mean():.1f}"),
        *(f"{value:.4f}" for value in np.quantile(kept, QUANTILES)),
        *(f"{np.mean(mode.error > tolerance):.2%}", f"{mode.capped:.2%}"),
        "" if kl is None else f"{kl:.5f}",
    ]


def report(rows: Sequence[list[str]], tolerance: float) -> str:
    """Markdown of lines that `row_of` made."""
    headers = ["mode", "tokens retrieved", "tokens read", "median error", "99 %", "largest"]
    return table([*headers, f"error above {tolerance:g}", "heads capped", "KL, nats"], list(rows))


def _at(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Take each kv head's values at its turn: `[steps, budgets, ..., kv_heads, n]`."""
    place = turn[:, None, ..., None]
    return np.take_along_axis(values, np.broadcast_to(place, (*place.shape[:-1], 1)), axis=1)[:, 0]
