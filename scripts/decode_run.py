"""A decode benchmark's run: all configurations in their order, each kept as soon as it is found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from decode_baselines import HostManagedBaseline, TransformersBaseline
from decode_configurations import CALLS, Bench, Method
from decode_report import add_ratios
from torch_baseline import Case

from models.config import ModelConfig
from wavejax.evaluation.files import write_growing

# An attention's name, where wave attention's rows are, and the attention.
Choice = tuple[str, str | None, Method]

# What makes two results those of one configuration.
IDENTITY = ("context", "batch", "attention", "store")


class Report:
    """What a run found, written to NAME.unfinished.json until all is there.

    Attributes:
        content: what is written, as JSON.
    """

    def __init__(self, out: Path | None):
        """Write to `out`, or nowhere."""
        self.content: dict[str, Any] = {}
        self._out = out

    def keep(self, *, whole: bool = False) -> None:
        """Write what there is."""
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            write_growing(self._out, json.dumps(self.content, indent=1), whole=whole)


@dataclass(frozen=True)
class Job:
    """One configuration: `asked` is its batch as the user said it, `batch` the sequences."""

    context: int
    asked: int | str
    batch: int
    choice: Choice


def jobs_of(
    bench: Bench, choices: Sequence[Choice], contexts: Sequence[int], batches: Sequence[int | str]
) -> list[Job]:
    """Return all configurations in the order in which they are to run.

    Args:
        bench: knows how many sequences fit.
        choices: attentions.
        contexts: tokens of each sequence.
        batches: numbers; "max", the most that each has room for; "common", that all have room for.
    """
    jobs = []
    # What is large comes first: of memory that is freed, only a part may be pinned again.
    for context in sorted(contexts, reverse=True):
        largest = bench.largest_of_each([attention for _, _, attention in choices], context)
        common = min(
            most
            for (kind, _, _), most in zip(choices, largest, strict=True)
            if kind != "transformers"
        )
        for asked in sorted(batches, key=lambda b: -b if isinstance(b, int) else -inf):
            for choice, most in zip(choices, largest, strict=True):
                batch = most if asked == "max" else common
                batch = asked if isinstance(asked, int) else batch
                jobs.append(Job(context, asked, batch, choice))
    # XLA keeps the host's memory that it pinned for rows; these give all but two blocks back.
    return sorted(jobs, key=lambda job: not isinstance(job.choice[2], HostManagedBaseline))


def run_jobs(bench: Bench, jobs: Sequence[Job], report: Report) -> list[dict[str, Any]]:
    """Run configurations; print and keep each one's figures, or how it failed."""
    results: list[dict[str, Any]] = []
    report.content["results"] = results
    for job in jobs:
        kind, store, attention = job.choice
        name = "-".join(filter(None, (kind, store, str(job.context), str(job.batch))))
        head = {
            "context": job.context,
            "batch_asked": job.asked,
            "batch": job.batch,
            "attention": kind,
            "store": store,
        } | bench.held_as(attention, job.context)
        result = None
        # The largest batch may be one that was also asked for by its number.
        if not isinstance(attention, TransformersBaseline):
            done = (one for one in results if all(one[k] == head[k] for k in IDENTITY))
            result = next(done, None)
        if result is None:
            result = bench.attempt(attention, job.batch, job.context, name, job.asked)
        results.append(result | head)
        add_ratios(results)
        shown = {k: v for k, v in results[-1].items() if not isinstance(v, (dict, list))}
        print(json.dumps(shown), flush=True)
        report.keep()
    return results


def time_outsider(
    model: ModelConfig,
    dtype: str,
    steps: int,
    contexts: Sequence[int],
    batches: Sequence[int | str],
    report: Report,
) -> list[Choice]:
    """Time transformers' Llama, before JAX's device starts; print and keep each case as it comes.

    Args:
        model, dtype, steps, contexts, batches: see `TransformersBaseline.timed`.
        report: gets "transformers", all cases, and "missing", why nothing could be timed.

    Returns:
        the baseline as a choice; none if nothing could be timed.
    """
    cases: list[dict[str, Any]] = []
    report.content["transformers"] = cases

    def tell(case: Case, found: dict[str, Any]) -> None:
        cases.append({"context": case[0], "batch_asked": case[1]} | found)
        print(f"transformers: {json.dumps(cases[-1])}", flush=True)
        report.keep()

    outsider = TransformersBaseline.timed(model, dtype, steps, CALLS, contexts, batches, tell)
    if outsider.missing is None:
        return [("transformers", None, outsider)]
    report.content["missing"] = {"transformers": outsider.missing}
    print(f"transformers: {outsider.missing}", flush=True)
    report.keep()
    return []
