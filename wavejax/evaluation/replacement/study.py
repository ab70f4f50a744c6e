"""The comparison: policies, cache sizes and units on recorded traces; tables and a plot."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from wavejax.evaluation.replacement.policies import policies
from wavejax.evaluation.replacement.simulate import PAGE_BYTES, Order, Reads, Uses, simulate
from wavejax.evaluation.replacement.trace import Trace

OPTIMUM = "optimum"
UNITS: tuple[tuple[int, Order], ...] = (
    (1, "token"), (2, "token"), (4, "token"), (8, "token"),
    (1, "cluster"), (2, "cluster"), (4, "cluster"), (8, "cluster"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One simulation.

    Attributes:
        method: whose trace.
        policy: by name, or OPTIMUM.
        share: slots of the cache, as a share of the rows.
        size, order: rows of a unit, and in which order they are neighbours.
    """

    method: str
    policy: str
    share: float
    size: int
    order: Order


def cases_of(
    method: str, shares: Sequence[float], unit_policies: Sequence[str], unit_shares: Sequence[float]
) -> list[Case]:
    """All policies on single rows, and some of them, at some sizes of cache, on groups."""
    single = [
        Case(method, policy, share, 1, "token")
        for policy in (*policies(), OPTIMUM)
        for share in shares
    ]
    groups = [
        Case(method, policy, share, size, order)
        for policy, share, (size, order) in itertools.product(unit_policies, unit_shares, UNITS[1:])
    ]
    return single + groups


def run(
    trace: Trace,
    cases: Sequence[Case],
    row_bytes: int,
    warm_up: int,
    progress: Callable[[], Any],
    page_bytes: int = PAGE_BYTES,
) -> dict[Case, Reads]:
    """Simulate the cases on a trace; `progress` is called after each.

    Raises:
        InputError: the trace has no step after the warm-up.
    """
    if warm_up >= len(trace.rows):
        raise InputError(f"a trace has {len(trace.rows)} steps; the warm-up takes {warm_up}")
    results = {}
    make = policies()
    by_unit = sorted(cases, key=lambda case: (case.order, case.size))
    for (order, size), group in itertools.groupby(by_unit, key=lambda c: (c.order, c.size)):
        uses = Uses(trace, size, order, row_bytes, page_bytes)
        for case in group:
            policy = OPTIMUM if case.policy == OPTIMUM else make[case.policy]()
            slots = max(1, round(case.share * uses.tokens / size))
            results[case] = simulate(uses, policy, slots, warm_up)
            progress()
    return results


def mean(several: Sequence[dict[Case, Reads]]) -> dict[Case, Reads]:
    """Return the means over traces of one method."""
    first = several[0]
    return {
        case: Reads(*np.mean([dataclasses.astuple(one[case]) for one in several], axis=0).tolist())
        for case in first
    }


def policy_table(results: dict[Case, Reads], method: str) -> str:
    """Rows missed a step and head, by policy and cache size, in Markdown."""
    single = {
        c: r for c, r in results.items() if c.method == method and (c.size, c.order) == UNITS[0]
    }
    shares = sorted({case.share for case in single})
    names = list(dict.fromkeys(case.policy for case in single))
    lines = [
        f"{method}: rows missed a step and head, of {next(iter(single.values())).wanted:.1f}",
        "",
        "| policy | " + " | ".join(f"{share:.0%}" for share in shares) + " |",
        "| --- |" + " --- |" * len(shares),
    ]
    for name in names:
        cells = [f"{single[Case(method, name, share, *UNITS[0])].missed:.2f}" for share in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unit_table(
    results: dict[Case, Reads],
    method: str,
    policy: str,
    share: float,
    page_bytes: int = PAGE_BYTES,
) -> str:
    """Return what each unit misses and reads at one cache size, in Markdown."""
    lines = [
        f"{method}: units, {policy}, a cache of {share:.0%}; a step and head",
        "",
        f"| unit | rows missed | rows read | pages of {page_bytes / 1024:g} KB |",
        "| --- | --- | --- | --- |",
    ]
    for size, order in UNITS:
        reads = results.get(Case(method, policy, share, size, order))
        if reads is not None:
            name = "1 row" if size == 1 else f"{size} rows"
            values = f"{reads.missed:.2f} | {reads.read:.1f} | {reads.pages:.2f}"
            lines.append(f"| {name} in {order} order | {values} |")
    return "\n".join(lines)


def as_json(results: dict[Case, Reads]) -> list[dict[str, Any]]:
    """One object a case."""
    return [dataclasses.asdict(case) | dataclasses.asdict(r) for case, r in results.items()]


def plot(results: dict[Case, Reads], file: Path) -> None:
    """Draws rows missed by cache size, a panel a method, a line a policy, on single rows.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("a plot needs matplotlib; run: pip install 'matplotlib>=3.8'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(case.method for case in results))
    figure, panels = pyplot.subplots(
        1, len(methods), figsize=(4.5 * len(methods), 4), squeeze=False, layout="constrained"
    )
    for panel, method in zip(panels[0], methods, strict=True):
        single = [c for c in results if c.method == method and (c.size, c.order) == UNITS[0]]
        for name in dict.fromkeys(case.policy for case in single):
            line = sorted((c.share, results[c].missed) for c in single if c.policy == name)
            style = "k--" if name == OPTIMUM else "o-"
            panel.plot(*zip(*line, strict=True), style, label=name, markersize=3, linewidth=1)
        panel.set(title=method, xscale="log", xlabel="slots, as a share of the rows", ylim=0)
        panel.set_xticks(sorted({c.share for c in single}))
        panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, 0))
        panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    panels[0][0].set_ylabel("rows missed a step and head")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(file)
    pyplot.close(figure)
