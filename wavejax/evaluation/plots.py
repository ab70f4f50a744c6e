"""Plots of evaluations, as PNG files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from wavejax.evaluation.files import replacing
from wavejax.evaluation.summary import able_tasks, bootstrap, values_of


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "plots need matplotlib: pip install 'wavejax[evaluation]', or give `plots=False`"
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_scores(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Average score by length, a line for each method, with 95 % intervals."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for length in sorted({record["length"] for record in records}):
        scores = values_of(records, "score", length)
        able, _ = able_tasks(scores)
        for method, tasks in scores.items():
            groups = [[100 * x for x in tasks[task].values()] for task in able if task in tasks]
            if groups and len(groups) == len(able):
                lines.setdefault(method, []).append((length, *bootstrap(groups)))
    figure, axes = _figure("prompt and answer, tokens", "score of 100, mean over tasks")
    for method, points in lines.items():
        x, y, half = np.array(points).T
        axes.errorbar(x, y, yerr=np.nan_to_num(half), marker="o", capsize=2, label=method)
    if lines:
        _ticks(axes, sorted({x for points in lines.values() for x, _, _ in points}))
    axes.set_ylim(bottom=0)
    finish(figure, axes, path)


def plot_by_budget(
    points: Mapping[str, Sequence[tuple[float, float]]], label: str, path: Path, *, log: bool
) -> None:
    """One figure by the share of tokens retrieved.

    Args:
        points: for each method (share, figure).
        label: of the figures.
        path: where to write.
        log: on a logarithmic axis.
    """
    figure, axes = _figure("share of tokens retrieved, %", label)
    for method, values in points.items():
        x, y = np.array(sorted(values)).T
        axes.plot(100 * x, y, marker="o", label=method)
    _ticks(axes, sorted({100 * x for values in points.values() for x, _ in values}))
    if log:
        axes.set_yscale("log")
    finish(figure, axes, path)


def plot_by_layer(values: Mapping[str, np.ndarray], label: str, path: Path) -> None:
    """Means over heads by layer, with the range of the heads.

    Args:
        values: for each method `[layers, heads]`.
        label: of the values.
        path: where to write.
    """
    figure, axes = _figure("layer", label)
    for method, table in values.items():
        layers = np.arange(table.shape[0])
        (line,) = axes.plot(layers, table.mean(axis=1), marker=".", label=method)
        axes.fill_between(
            layers, table.min(axis=1), table.max(axis=1), alpha=0.15, color=line.get_color()
        )
    finish(figure, axes, path)


def plot_by_position(
    values: Mapping[str, np.ndarray], size: int, label: str, path: Path, *, log: bool = False
) -> None:
    """Means over each `size` generated tokens in turn; for each method `[chunks]`."""
    figure, axes = _figure("tokens generated", label)
    for method, means in values.items():
        axes.plot(size * (np.arange(len(means)) + 1), means, marker=".", label=method)
    if log:
        axes.set_yscale("log")
    finish(figure, axes, path)


def kl_by_position(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Mean KL of each chunk of long answers, by method; answers cut short are left out."""
    long = [record for record in records if record["kl_by_chunk"]]
    chunks = max((len(record["kl_by_chunk"]) for record in long), default=0)
    found: dict[str, list[list[float]]] = {}
    for record in long:
        if len(record["kl_by_chunk"]) == chunks and not re.match("full", record["method"]):
            found.setdefault(record["method"], []).append(record["kl_by_chunk"])
    return {method: np.mean(values, axis=0) for method, values in found.items()}


def _figure(x: str, y: str) -> tuple[Any, Any]:
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _ticks(axes: Any, places: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def finish(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure, with a legend in these axes if they have labels; let go of it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    pyplot().close(figure)
