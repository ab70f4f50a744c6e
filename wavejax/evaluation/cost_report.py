"""What methods cost beside how near they come to full attention: a table, and KL by bytes read."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.evaluation import plots
from wavejax.evaluation.cost import Cost, cost_of
from wavejax.evaluation.methods import parse_methods
from wavejax.evaluation.summary import table
from wavejax.store.shape import CacheShape

# What `report_attention.py` gives its methods besides the share that they retrieve.
NO_FLOORS = {"min_clusters": 0, "min_candidate_tokens": 0, "min_retrieved_tokens": 0}
NOTE = (
    "Bytes: all that the step after the prompt must read of one sequence's KV cache, each array "
    "once, over all layers; and what finds tokens, of each indexed token and kv head. The oracle's "
    "search counts as free. Quest reads the least and greatest keys of its pages. With a tolerance "
    "a step reads more than this, by `min_token_mass` less. KL and the rest: means over tasks."
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one length.

    Attributes:
        method: its name; behind it how many samples it has, if others have more.
        length: tokens of prompt and answer.
        cost: what it costs.
        kl, kept, score: means over the tasks; None where no sample has one.
    """

    method: str
    length: int
    cost: Cost
    kl: float | None
    kept: float | None
    score: float | None

    @property
    def family(self) -> str:
        """The method without its settings and budget."""
        return self.method.split("[")[0].split(" ")[0]


def points_of(
    records: Sequence[Mapping[str, Any]],
    shape: CacheShape,
    settings: Mapping[str, Any],
) -> tuple[list[Point], list[str]]:
    """Count the costs of the methods that records are of.

    Args:
        records: of `evaluate.py`, or of `report_attention.py` with `name` and `fraction`.
        shape: the layers and heads of the model's cache.
        settings: of the folder: `dtype`, and what the methods had for a budget and for defaults.

    Returns:
        a point a method and length, by length, then as they come; and the names that are no
        methods any more, or whose settings are not.
    """
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["length"], record["method"]].append(record)
    samples: dict[int, int] = defaultdict(int)
    for (length, _), group in groups.items():
        samples[length] = max(samples[length], len(group))
    found, unknown = [], set()
    for (length, method), group in sorted(groups.items(), key=lambda item: item[0][0]):
        try:
            attention = _attention_of(group[0], settings)
        except InputError:
            unknown.add(method)
            continue
        sizes = [record["clusters"] for record in group if record.get("clusters") is not None]
        tokens = [record.get("prompt_tokens", length) for record in group]
        cost = cost_of(
            *(attention, shape, round(float(np.mean(tokens))), settings["dtype"]),
            clusters=float(np.mean(sizes)) if sizes else None,
        )
        part = len(group) < samples[length]
        name = f"{method} ({len(group)} of {samples[length]} samples)" if part else method
        figures = (_mean(group, field) for field in ("kl", "kept", "score"))
        found.append(Point(name, length, cost, *figures))
    return found, sorted(unknown)


def summarise_costs(points: Sequence[Point], unknown: Sequence[str] = ()) -> str:
    """Markdown: for each length the methods, their costs, and how near they come; cheapest first.

    Args:
        points: from `points_of`, as `unknown`.
        unknown: names without a cost.
    """
    parts = []
    headers = ["method", "bytes a step and sequence", "index bytes a token and kv head"]
    for length in sorted({point.length for point in points}):
        rows = [
            [
                point.method,
                f"{point.cost.step.total:,.0f}",
                f"{point.cost.index:.1f}",
                *_cells(point),
            ]
            for point in sorted(points, key=lambda point: point.cost.step.total)
            if point.length == length
        ]
        parts += [f"## Costs, {length} tokens", table([*headers, "KL", "kept", "score"], rows)]
    if unknown:
        parts.append(f"Not counted, since this version has no such method: {', '.join(unknown)}")
    return "\n\n".join([*parts, NOTE]) + "\n"


def panels_of(model: str, points: Sequence[Point]) -> dict[str, list[Point]]:
    """Sort a model's points into panels of `plot_kl_by_bytes`, one a length, and name them."""
    found: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        found[f"{model}, {point.length:,} tokens"].append(point)
    return dict(found)


def plot_kl_by_bytes(panels: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write KL against the bytes that a step reads: a point a method, both axes logarithmic.

    A method that equals full attention has no logarithm of its KL: an upright line shows its bytes.

    Args:
        panels: points by the title of their panel, side by side.
        path: where to write.
    """
    families = list(dict.fromkeys(p.family for points in panels.values() for p in points))
    colours = {family: f"C{i % 10}" for i, family in enumerate(families)}
    methods = dict.fromkeys((p.family, p.method) for points in panels.values() for p in points)
    numbers = {method: i + 1 for i, (_, method) in enumerate(methods)}
    pyplot = plots.pyplot()
    figure, all_axes = pyplot.subplots(
        *(1, len(panels)),
        figsize=(1 + 6.5 * len(panels), 5.5 + 0.2 * len(methods)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (title, points) in zip(all_axes[0], panels.items(), strict=True):
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("bytes read by a step, of one sequence")
        axes.grid(alpha=0.3, which="both")
        for point in points:
            if point.kl is None:
                continue
            x, colour = point.cost.step.total, colours[point.family]
            number = str(numbers[point.method])
            label = {"fontsize": 9, "xytext": (4, 3), "textcoords": "offset points"}
            if point.kl > 0:
                axes.plot(x, point.kl, marker="o", color=colour)
                axes.annotate(number, (x, point.kl), **label)
            else:
                axes.axvline(x, color=colour, linestyle="--")
                axes.annotate(number, (x, 0.01), xycoords=axes.get_xaxis_transform(), **label)
    all_axes[0][0].set_ylabel("KL from full attention, nats, mean over tasks")
    # Names are long, and points near each other: so a point has a number, explained below.
    marks = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colours[family])
        for family, _ in methods
    ]
    named = [f"{number}  {method}" for method, number in numbers.items()]
    figure.legend(marks, named, loc="outside lower left", fontsize="small")
    plots.finish(figure, all_axes[0][-1], path)


def _attention_of(
    record: Mapping[str, Any], settings: Mapping[str, Any]
) -> DenseAttention | WaveAttention:
    """Make the attention that a record is of."""
    name = record["method"]
    fields = "retrieval_fraction", "min_retrieved_tokens"
    budget = {field: settings[field] for field in fields if field in settings}
    if "fraction" in record:
        name, budget = record["name"], {"retrieval_fraction": record["fraction"], **NO_FLOORS}
    [attention] = parse_methods(name, budget, settings.get("defaults")).values()
    return attention


def _mean(group: Sequence[Mapping[str, Any]], field: str) -> float | None:
    """Return the mean over tasks of the means over samples."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in group:
        if record.get(field) is not None:
            by_task[record["task"]].append(record[field])
    return float(np.mean([np.mean(values) for values in by_task.values()])) if by_task else None


def _cells(point: Point) -> list[str]:
    cells = ["" if point.kl is None else f"{point.kl:.4f}"]
    for share in (point.kept, point.score):
        cells.append("" if share is None else f"{100 * share:.1f}")
    return cells
