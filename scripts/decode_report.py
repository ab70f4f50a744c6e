"""The table and the plot of a decode benchmark's results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wavejax.evaluation.files import replacing
from wavejax.evaluation.plots import pyplot

COLUMNS = (
    *("tokens", "batch", "attention", "precision", "budget", "ms/step", "floor", "tokens/s"),
    *("to full", "to full-int8", "to host", "to managed", "to ahead", "to transformers"),
    *("hits", "host MB", "GB/s of step", "prefill s", "growth ms", "kernels ms"),
)

# Full attention in the model's dtype and with rows in int8, and how ratios to them are named.
FULL = {"full": "ratio", "full-int8": "int8_ratio"}

# Others' ways to decode, and how ratios to them are named.
BASELINES = {
    "host-managed": "managed_ratio",
    "host-managed-ahead": "ahead_ratio",
    "transformers": "transformers_ratio",
}

# By the batch asked for, in the order of their first results.
STYLES = ("-", ":", "--", "-.")


def label(result: dict[str, Any]) -> str:
    """Return the attention's name, and where wave attention's rows are."""
    store = result["store"]
    return result["attention"] + (f", {store}" if store else "")


def add_ratios(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result its tokens a second over others' at the same context.

    `full_ratio` over full attention's at the same batch, `best_ratio` over full attention's best
    batch, in the model's dtype; `full_int8_ratio` and `best_int8_ratio` over its own with rows in
    int8; wave attention's `host_ratio` over that of rows in host memory, read in place, at the same
    batch; `managed_ratio`, `ahead_ratio` and `transformers_ratio` over the baselines' at the same
    batch.
    """
    timed = [one for one in results if "tokens_per_s" in one]
    speeds = {
        (one["attention"], one["store"], one["context"], one["batch"]): one["tokens_per_s"]
        for one in timed
    }
    for one in timed:
        at, speed = (one["context"], one["batch"]), one["tokens_per_s"]
        for full, ratio in FULL.items():
            of_full = [x for key, x in speeds.items() if (key[0], key[2]) == (full, at[0])]
            if of_full:
                one[f"best_{ratio}"] = speed / max(of_full)
            if (full, None, *at) in speeds:
                one[f"full_{ratio}"] = speed / speeds[full, None, *at]
        for other, ratio in BASELINES.items():
            if (other, None, *at) in speeds:
                one[ratio] = speed / speeds[other, None, *at]
        if one["attention"] == "wave" and ("wave", "host", *at) in speeds:
            one["host_ratio"] = speed / speeds["wave", "host", *at]


def print_table(results: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print a line for each result; below, how others failed, and which blocks are not pinned."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    failures, notes = [], []
    for one in sorted(results, key=lambda one: (one["context"], one["batch"])):
        head = [str(one["context"]), str(one["batch"]), label(one)]
        held = [_precision(one["precision"]), _number(one["budget"], "d")]
        if "ms_per_step" not in one:
            table.add_row(*head, *held, "failed")
            failures.append(f"{' x '.join(head)}: {one['error']}")
            continue
        if one.get("not_pinned"):
            notes.append(f"{' x '.join(head)}: its blocks are not pinned: {one['not_pinned']}")
        growth, kernels = one.get("growth", {}), one.get("profile", {})
        table.add_row(
            *head,
            *held,
            f"{one['ms_per_step']:.2f}",
            f"{one['floor_ms']:.2f}",
            f"{one['tokens_per_s']:.1f}",
            *(_number(one.get(f"full_{ratio}"), ".2f", "x") for ratio in FULL.values()),
            _number(one.get("host_ratio"), ".2f", "x"),
            *(_number(one.get(ratio), ".2f", "x") for ratio in BASELINES.values()),
            _number(one.get("hit_ratio"), ".1%"),
            _number(one["bytes_per_step"]["host"] / 1e6 or None, ".1f"),
            _number(one.get("host_gb_per_s_of_step") or None, ".1f"),
            _number(one["prefill"].get("seconds"), ".2f"),
            _number(growth.get("amortised_ms_per_step"), ".3f"),
            _number(kernels.get("kernels_ms_per_step"), ".2f"),
        )
    # Wide, so that a table in a file is not folded.
    (console or Console(width=240)).print(table)
    for line in (*failures, *notes):
        print(line)


def _precision(of: dict[str, str]) -> str:
    """Return the weights' dtype, and the rows' if it is another."""
    return of["weights"] if of["weights"] == of["rows"] else f"{of['weights']}, {of['rows']} rows"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens a second by context: a colour for each attention and store, a dash for each batch."""
    lines: dict[tuple[str, Any], list[tuple[int, float, int]]] = {}
    for one in results:
        if "tokens_per_s" in one:
            key = label(one), one["batch_asked"]
            lines.setdefault(key, []).append((one["context"], one["tokens_per_s"], one["batch"]))
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    names, batches = (list(dict.fromkeys(key[i] for key in lines)) for i in range(2))
    for (name, batch), points in lines.items():
        x, y, held = zip(*sorted(points), strict=True)
        axes.plot(
            x,
            y,
            color=f"C{names.index(name)}",
            linestyle=STYLES[batches.index(batch) % len(STYLES)],
            marker="o",
            label=f"{name}, batch {batch}",
        )
        if batch in ("max", "common"):
            for at, speed, count in zip(x, y, held, strict=True):
                axes.annotate(str(count), (at, speed), xytext=(0, 5), textcoords="offset points")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("tokens/s, all sequences")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    if lines:
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part)
