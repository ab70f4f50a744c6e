"""Figures of attention itself, by layer, head, budget and generated length, and their tables."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wavejax.evaluation import plots
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.probe import probe
from wavejax.evaluation.samples import Sample
from wavejax.evaluation.summary import bootstrap, table
from wavejax.evaluation.teacher_forcing import CHUNK, bins, judge

WORST_HEADS = 10
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class AttentionFigures:
    """A method's attention on one sample; means over the answer's tokens.

    Attributes:
        kl: of the output, KL(full || method), in nats.
        recall, error: `[layers][heads]`, see `ProbeState`.
        kl_by_chunk, recall_by_chunk, error_by_chunk: of each 128 tokens of the answer in turn;
            the last two also means over layers and heads.
    """

    kl: float
    recall: list[list[float]]
    error: list[list[float]]
    kl_by_chunk: list[float]
    recall_by_chunk: list[float]
    error_by_chunk: list[float]


def measure(
    bench: Bench,
    sample: Sample,
    length: int,
    methods: Sequence[str],
    *,
    sampled: bool,
    seed: int,
    index: int,
) -> Iterator[tuple[str, AttentionFigures]]:
    """Measures the bench's methods of these names on one sample; see `Bench.run`."""
    shared, answers = bench.answer([sample], length, sampled=sampled, seed=seed, first=index)
    for name in methods:
        generator = bench.generators[name]
        kl = judge(generator, bench.params, shared.state(generator), answers).kl[:, 0]
        recall, error = (x[:, :, 0] for x in probe(generator, bench.params, shared, answers))
        yield (
            name,
            AttentionFigures(
                float(kl.mean()),
                recall.mean(axis=0).round(DIGITS).tolist(),
                error.mean(axis=0).round(DIGITS).tolist(),
                list(bins(kl, CHUNK)),
                list(bins(recall.mean(axis=(1, 2)), CHUNK)),
                list(bins(error.mean(axis=(1, 2)), CHUNK)),
            ),
        )


def summarise(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: for each length recall, error and KL by method and budget, and the worst heads.

    Args:
        records: fields of `AttentionFigures`, and `task`, `length`, `name`, `fraction`.
    """
    parts = []
    for length, of_length in by_length(records).items():
        parts += [f"## {length} tokens", *_tables(of_length)]
    parts.append(
        "Means over tasks, samples, tokens, layers and heads; ±: half the width of the 95 % "
        "interval, by bootstrap over the samples of each task. Recall: of the mass, what lies on "
        "tokens read exactly.\n"
    )
    return "\n\n".join(parts)


def _tables(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the figures of one length, and the heads of most error."""
    rows, worst = [], []
    for (name, fraction), group in by_method_and_budget(records).items():
        cells = []
        for field in ("recall", "error", "kl"):
            by_task: dict[str, list[float]] = defaultdict(list)
            for record in group:
                by_task[record["task"]].append(float(np.mean(record[field])))
            mean, half = bootstrap(list(by_task.values()))
            cells.append(f"{mean:.4f}" if np.isnan(half) else f"{mean:.4f} ± {half:.4f}")
        rows.append([name, f"{fraction:.2%}", str(len(group)), *cells])
        error = np.mean([record["error"] for record in group], axis=0)
        places = np.argsort(error, axis=None)[::-1][:WORST_HEADS]
        heads = [divmod(int(place), error.shape[1]) for place in places]
        listed = ", ".join(f"{layer}.{head}: {error[layer, head]:.2f}" for layer, head in heads)
        worst.append([name, f"{fraction:.2%}", listed])
    headers = ["method", "budget", "samples", "recall of mass", "relative error", "KL, nats"]
    return [
        table(headers, rows),
        table(["method", "budget", "heads of most error (layer.head: error)"], worst),
    ]


def plot_all(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the plots: by budget, by layer at the middle budget, by generated length.

    Each length has its own; with several, their names end with it.
    """
    lengths = by_length(records)
    for length, of_length in lengths.items():
        _plot(of_length, folder, f"_{length}" if len(lengths) > 1 else "")


def _plot(records: Sequence[Mapping[str, Any]], folder: Path, suffix: str) -> None:
    groups = by_method_and_budget(records)
    for field, label, log in (
        ("recall", "recall of attention mass", False),
        ("error", "relative error of attention's output", True),
        ("kl", "KL from full attention, nats", True),
    ):
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (name, fraction), group in groups.items():
            points[name].append((fraction, float(np.mean([record[field] for record in group]))))
        plots.plot_by_budget(points, label, folder / f"{field}_by_budget{suffix}.png", log=log)
    fractions = sorted({fraction for _, fraction in groups})
    middle = fractions[len(fractions) // 2]
    at = f"retrieving {middle:.2%}"
    of_middle = {name: group for (name, fraction), group in groups.items() if fraction == middle}
    for field, label in (("recall", "recall of mass"), ("error", "relative error")):
        by_layer = {
            name: np.mean([record[field] for record in group], axis=0)
            for name, group in of_middle.items()
        }
        path = folder / f"{field}_by_layer{suffix}.png"
        plots.plot_by_layer(by_layer, f"{label}, {at}; band: over heads", path)
    for field in ("recall", "error", "kl"):
        by_position = {}
        for name, group in of_middle.items():
            chunks = [record[f"{field}_by_chunk"] for record in group]
            # Answers that ended early would mix other samples into the last means.
            longest = max(map(len, chunks))
            by_position[name] = np.mean([row for row in chunks if len(row) == longest], axis=0)
        if all(len(means) > 1 for means in by_position.values()):
            path = folder / f"{field}_by_position{suffix}.png"
            plots.plot_by_position(by_position, CHUNK, f"{field}, {at}", path, log=field == "kl")


def by_length(
    records: Sequence[Mapping[str, Any]],
) -> dict[int, list[Mapping[str, Any]]]:
    """Return the records grouped by length, the shortest first."""
    groups: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["length"]].append(record)
    return dict(sorted(groups.items()))


def by_method_and_budget(
    records: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Return the records grouped by method and share of tokens retrieved."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["name"], record["fraction"]].append(record)
    return dict(sorted(groups.items()))
