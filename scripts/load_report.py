"""The table and the plot of a trace's replay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from wavejax.evaluation.files import replacing
from wavejax.evaluation.plots import pyplot

COLUMNS = (
    *("prompts", "requests", "failed", "first token s, median", "99 %"),
    *("between tokens ms, median", "99 %", "longest", "answer tokens/s", "prompt tokens/s"),
)
Results = Sequence[dict[str, Any]]


def summary(results: Results) -> dict[str, dict[str, float | None]]:
    """Sum up a replay: all requests, and those of which a prompt was reused, or none.

    Times are in seconds. Tokens a second are over the time from the first request's sending to the
    last one's end. A number of which there is nothing to tell is None.
    """
    reused = [one for one in results if one.get("cached_tokens", 0) > 0]
    groups = {"all": list(results)}
    if reused:
        groups |= {"reused": reused}
        groups |= {"read": [one for one in results if not one.get("cached_tokens", 0)]}
    return {name: _summary(group) for name, group in groups.items() if group}


def _summary(results: Results) -> dict[str, float | None]:
    done = [one for one in results if "error" not in one]
    first = [one["first_token_s"] for one in done]
    gaps = [gap for one in done for gap in one["gaps_s"]]
    start = min((one["sent_s"] for one in results), default=0.0)
    seconds = max((one["sent_s"] + one["total_s"] for one in results), default=0.0) - start
    return {
        "requests": len(results),
        "failed": len(results) - len(done),
        "first_token_median_s": _quantile(first, 0.5),
        "first_token_99_s": _quantile(first, 0.99),
        "gap_median_s": _quantile(gaps, 0.5),
        "gap_99_s": _quantile(gaps, 0.99),
        "gap_longest_s": _quantile(gaps, 1.0),
        "answer_tokens_per_s": _rate([one["completion_tokens"] for one in done], seconds),
        "prompt_tokens_per_s": _rate([one["prompt_tokens"] for one in done], seconds),
    }


def print_table(results: Results, console: Console | None = None) -> None:
    """Print a line for each group of requests, then what failed, each reason once."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for name, one in summary(results).items():
        table.add_row(
            name,
            *(_number(one[key], ".0f") for key in ("requests", "failed")),
            *(_number(one[key], ".3f") for key in ("first_token_median_s", "first_token_99_s")),
            *(_number(one[f"gap_{key}_s"], ".1f", 1e3) for key in ("median", "99", "longest")),
            *(_number(one[f"{key}_tokens_per_s"], ".1f") for key in ("answer", "prompt")),
        )
    console = console or Console(width=160)
    console.print(table)
    errors = [one["error"] for one in results if "error" in one]
    for error in dict.fromkeys(errors):
        console.print(f"{errors.count(error)} failed: {error}", markup=False)


def plot(results: Results, path: Path) -> None:
    """Time to first token by the prompt's length, and the share of gaps that are longer."""
    done = [one for one in results if "error" not in one]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for name, reused in (("read", False), ("reused", True)):
        points = [
            (one["prompt_tokens"], one["first_token_s"])
            for one in done
            if (one["cached_tokens"] > 0) == reused
        ]
        if points:
            left.scatter(*zip(*points, strict=True), s=12, alpha=0.7, label=name)
    left.set_xlabel("prompt, tokens")
    left.set_ylabel("time to first token, s")
    left.set_ylim(bottom=0)
    left.legend(fontsize="small")
    gaps = np.sort([1e3 * gap for one in done for gap in one["gaps_s"]])
    right.plot(gaps, 1 - np.arange(1, len(gaps) + 1) / max(1, len(gaps)))
    right.set_xlabel("between tokens, ms")
    right.set_ylabel("share of gaps that are longer")
    right.set_yscale("symlog", linthresh=1e-3)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part)


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else format(factor * value, form)


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _rate(counts: Sequence[int], seconds: float) -> float | None:
    return sum(counts) / seconds if seconds > 0 else None
