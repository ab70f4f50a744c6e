"""Tables of an evaluation's records, with 95 % intervals."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from wavejax.evaluation.methods import FULL

# Below this score, in points of 100, full attention cannot do the task at that length: the
# differences between methods there say nothing of the methods.
LEAST_FULL_SCORE = 10.0
RESAMPLES = 2000
Values = dict[str, dict[int, float]]


def values_of(records: Sequence[dict[str, Any]], field: str, length: int) -> dict[str, Values]:
    """One field's values by method, task and sample; those that are None are left out."""
    found: dict[str, Values] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["length"] == length and record[field] is not None:
            found[record["method"]][record["task"]][record["index"]] = record[field]
    return {method: dict(tasks) for method, tasks in found.items()}


def bootstrap(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of the groups' means, and half the width of its 95 % interval.

    By a percentile bootstrap, each group resampled by itself; NaN for the width where no group has
    two values.
    """
    arrays = [np.asarray(group, np.float64) for group in groups]
    mean = float(np.mean([array.mean() for array in arrays]))
    if all(len(array) < 2 for array in arrays):
        return mean, float("nan")
    rng = np.random.default_rng(0)
    means = [
        array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1) for array in arrays
    ]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return mean, float(high - low) / 2


def able_tasks(scores: dict[str, Values]) -> tuple[list[str], list[str]]:
    """Return the tasks that full attention can do, and those that it cannot.

    Without its scores, it can do all.
    """
    full = scores.get(FULL, {})
    tasks = sorted({task for values in scores.values() for task in values})
    unable = [
        task
        for task in tasks
        if task in full and 100 * np.mean(list(full[task].values())) < LEAST_FULL_SCORE
    ]
    return [task for task in tasks if task not in unable], unable


def summarise(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each length the scores by task and method, and the agreement with full."""
    parts = []
    for length in sorted({record["length"] for record in records}):
        of_length = [record for record in records if record["length"] == length]
        parts.append(f"## {length} tokens")
        if any(record["score"] is not None for record in of_length):
            parts.append(scoretable(of_length, length))
        parts.append(agreementtable(of_length, length))
    parts.append(
        "±: half the width of the 95 % interval, by bootstrap over the samples of each task. "
        "Against full: mean over samples of the difference to full attention's score."
    )
    return "\n\n".join(parts) + "\n"


def scoretable(records: Sequence[dict[str, Any]], length: int) -> str:
    """Scores of 100 by task (rows) and method; their average over the tasks that full can do.

    Behind a score by fewer samples than others have is their number.
    """
    scores = values_of(records, "score", length)
    methods = _in_order(scores)
    able, unable = able_tasks(scores)
    counts = _sample_counts(scores)
    rows = []
    for task in [*able, *unable]:
        groups = [list(scores[method].get(task, {}).values()) for method in methods]
        cells = [
            _points([group]) + (f" ({len(group)})" if 0 < len(group) < counts[task] else "")
            for group in groups
        ]
        rows.append([f"{task} ({counts[task]})", *cells])
    if able:
        averages, differences = [], []
        for method in methods:
            groups = [list(scores[method].get(task, {}).values()) for task in able]
            # An average over fewer samples, or fewer tasks, is not one to compare.
            whole = all(
                len(group) == counts[task] for group, task in zip(groups, able, strict=True)
            )
            averages.append(_points(groups) if whole else "")
            pairs = _against_full(scores, method, able)
            complete = method != FULL and len(pairs) == len(able)
            differences.append(_points(pairs, signed=True) if complete else "")
        rows += [["average", *averages], ["against full", *differences]]
    text = table(["score (samples)", *methods], rows)
    if unable:
        text += (
            f"\n\nNot in the average, since full attention scores below {LEAST_FULL_SCORE:.0f}: "
            + ", ".join(unable)
        )
    return text


def agreementtable(records: Sequence[dict[str, Any]], length: int) -> str:
    """Agreement with full attention on its own answers, by method: means over the tasks."""
    fields = {
        "KL, nats": ("kl", 1, 4),
        "same token, %": ("match", 100, 1),
        "kept, %": ("kept", 100, 1),
    }
    found = {field: values_of(records, field, length) for field, _, _ in fields.values()}
    nll = values_of(records, "nll", length)
    methods = _in_order(found["kl"])
    counts = _sample_counts(found["kl"])
    rows = []
    for method in methods:
        samples = sum(map(len, found["kl"][method].values()))
        part = f" ({samples} of {sum(counts.values())} samples)"
        row = [method + part * (samples < sum(counts.values()))]
        for field, scale, digits in fields.values():
            tasks = found[field].get(method, {})
            groups = [[scale * x for x in values.values()] for values in tasks.values()]
            row.append(_interval(groups, digits) if groups else "")
        text = nll.get(method, {}).get("perplexity")
        row.append(f"{np.exp(np.mean(list(text.values()))):.3f}" if text else "")
        rows.append(row)
    return table(["forced to say full attention's answer", *fields, "perplexity"], rows)


def _sample_counts(values: dict[str, Values]) -> dict[str, int]:
    """How many samples each task has, by whichever method has them."""
    found: dict[str, set[int]] = defaultdict(set)
    for tasks in values.values():
        for task, samples in tasks.items():
            found[task] |= samples.keys()
    return {task: len(samples) for task, samples in found.items()}


def _against_full(scores: dict[str, Values], method: str, tasks: list[str]) -> list[list[float]]:
    """For each task the samples' differences to full attention's score."""
    pairs = []
    for task in tasks:
        own, full = scores[method].get(task, {}), scores.get(FULL, {}).get(task, {})
        both = sorted(own.keys() & full.keys())
        if both:
            pairs.append([own[index] - full[index] for index in both])
    return pairs


def _points(groups: list[list[float]], signed: bool = False) -> str:
    return _interval([[100 * x for x in group] for group in groups if group], 1, signed)


def _interval(groups: list[list[float]], digits: int, signed: bool = False) -> str:
    if not groups:
        return ""
    mean, half = bootstrap(groups)
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def _in_order(by_method: dict[str, Any]) -> list[str]:
    """Full attention first, then as they come."""
    return sorted(by_method, key=lambda method: method != FULL)


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    text: str = tabulate()(rows, headers, tablefmt="github", disable_numparse=True)
    return text


def tabulate() -> Any:
    """Return the function `tabulate.tabulate`; InputError where it is not installed."""
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise InputError("tables need tabulate: pip install 'wavejax[evaluation]'") from error
    return tabulate
