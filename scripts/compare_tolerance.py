"""Compares the adaptive mode, a tolerance, with fixed budgets of as many tokens, on a real model.

    python scripts/compare_tolerance.py --lengths 2048 --method 'wave[min_retrieved_tokens=128]'

Full attention answers. In each step and layer wave attention attends to the same queries within
each tolerance. Then fixed budgets of as many tokens, in the mean of all samples of a length, attend
to the same. KL is that of each mode alone, errors passed on from layer to layer. Prints a table for
each tolerance.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from evaluation_options import dtype_option, haystack_option, seed_option
from tqdm import tqdm

from models.errors import InputError
from wavejax.attention.tolerance import with_most
from wavejax.attention.wave import WaveAttention
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.config import WaveConfig
from wavejax.engine.generator import DecodeState
from wavejax.engine.prompts import bucket
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.files import write_text
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.methods import parse_methods
from wavejax.evaluation.samples import Material, Task
from wavejax.evaluation.setup import make_room_for, open_subject, parse_numbers, run_facts
from wavejax.evaluation.shared_prefill import SharedPrefill
from wavejax.evaluation.summary import tabulate
from wavejax.evaluation.tasks import parse_tasks
from wavejax.evaluation.teacher_forcing import CHUNK, Answer, judge
from wavejax.evaluation.tolerance_probe import (
    BudgetedAttention,
    Measured,
    ladder,
    measure_budgets,
    with_budget,
    with_tolerance,
)
from wavejax.evaluation.tolerance_report import Mode, adaptive, by_truth, fixed, report, row_of
from wavejax.store.sizes import index_room

ADAPTIVE, FIXED, TRUTH = "adaptive", "fixed", "by true errors"
# What a fixed budget is to equal of the adaptive mode.
EQUAL = {
    "retrieved": "fixed, as many retrieved",
    "read": "fixed, as many read",
    "truth": "fixed, as many as by true errors",
}


@click.command(
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.option("--model", help="As for wavejax.generate.  [default: the installed SmolLM2]")
@click.option("--tasks", default="fwe,vt,niah_multiquery", show_default=True)
@click.option("--lengths", default="4096", show_default=True, help="Tokens, prompt and answer.")
@click.option(
    "--method",
    default="wave",
    show_default=True,
    help="wave, with settings if wanted: wave[min_retrieved_tokens=1024,tolerance_draws=64]",
)
@click.option("--tolerances", default="0.05,0.1,0.2", show_default=True)
@click.option("--samples", type=click.IntRange(1), default=2, show_default=True)
@seed_option
@haystack_option
@dtype_option
@click.option("--json", "json_file", type=Path, help="A file for all figures.")
def command(
    model: str | None,
    tasks: str,
    lengths: str,
    method: str,
    tolerances: str,
    samples: int,
    seed: int,
    haystack: tuple[str, ...],
    dtype: str,
    json_file: Path | None,
) -> None:
    """Compare a tolerance with fixed budgets of as many tokens; print a table for each."""
    chosen, sizes = parse_tasks(tasks), parse_numbers(lengths, int, "lengths")
    limits = parse_numbers(tolerances, float, "tolerances")
    attention = attention_of(method, limits)
    make_room_for(json_file)
    tabulate()  # Not to be found missing in the end.
    subject = open_subject(model, dtype)
    for length in sizes:
        subject.check_length(length)
        if attention.config.reads_all(length) or not budgets_at(attention.config, length, chosen):
            raise InputError(
                f"at {length} tokens {method} reads all of them and estimates nothing: give a "
                "smaller min_retrieved_tokens in --method, or longer --lengths"
            )
    material = Material(subject.tokenizer, load_haystack(haystack))
    params = subject.checkpoint.load_params(subject.dtype)
    facts = {"model": subject.name, "method": method, "dtype": subject.dtype, "seed": seed}
    found: list[dict[str, Any]] = []
    for length in sizes:
        budgets = budgets_at(attention.config, length, chosen)
        wide = dataclasses.replace(with_most(attention.config, budgets[-1]), tolerance=0.0)
        bench = Bench(
            subject.checkpoint.config,
            params,
            subject.tokenizer,
            {ADAPTIVE: attention, FIXED: BudgetedAttention(wide, "device")},
            stop_tokens=subject.stop_tokens,
        )
        comparison = Comparison(bench, material, length, seed, limits, budgets)
        found += comparison.run(chosen, samples)
        if json_file is not None:
            content = {"settings": facts, "run": run_facts(), "figures": found}
            write_text(json_file, json.dumps(content, indent=1) + "\n")


def budgets_at(config: WaveConfig, length: int, tasks: Mapping[str, Task]) -> list[int]:
    """Return the budgets of later turns; none where the first one is all that there is room for."""
    # As the bench makes room: answers come in whole chunks.
    new_tokens = -(-max(task.new_tokens for task in tasks.values()) // CHUNK) * CHUNK
    return ladder(config, index_room(config, bucket(length), new_tokens, 1)[0])


def attention_of(method: str, limits: list[float]) -> WaveAttention:
    """Make the adaptive mode; raise InputError where the method can have no tolerance."""
    [attention] = parse_methods(method, {}).values()
    if type(attention) is not WaveAttention:
        raise InputError(f"--method is {method!r}; it must be wave, with settings if wanted")
    if attention.config.min_token_mass or attention.config.exact_fallback:
        raise InputError(
            "min_token_mass and exact_fallback change what is read, which is not counted here: "
            "leave them out"
        )
    config = dataclasses.replace(attention.config, tolerance=limits[0])
    if config.tolerance_cap < 2:
        raise InputError("tolerance_cap is 1: heads retrieve no more than at first; give 2 or more")
    return WaveAttention(config, "device")


class Comparison:
    """The two modes at one length.

    Args:
        bench: with the adaptive mode and the fixed one.
        material: of which samples are made.
        length: the most tokens of prompt and answer.
        seed: of the samples.
        limits: the tolerances.
        budgets: twice the first one, and so on up to the cap.
    """

    def __init__(
        self,
        bench: Bench,
        material: Material,
        length: int,
        seed: int,
        limits: list[float],
        budgets: list[int],
    ):
        self.bench, self.material, self.length, self.seed = bench, material, length, seed
        self.limits, self.budgets = limits, budgets
        attention = bench.generators[ADAPTIVE].attention
        assert isinstance(attention, WaveAttention)
        self.config: WaveConfig = attention.config

    def run(self, tasks: dict[str, Task], samples: int) -> list[dict[str, Any]]:
        """Run all samples twice, print the tables, and return their figures."""
        jobs = [(name, task, index) for name, task in tasks.items() for index in range(samples)]
        modes: dict[tuple[str, float], list[Mode]] = {}
        kl: dict[tuple[str, float], list[float]] = {}
        starts: list[Mode] = []
        with tqdm(total=2 * len(jobs), unit="sample", file=sys.stderr, disable=None) as bar:
            for _, task, index in jobs:
                shared, answers = self._answer(task, index)
                found = self._measure(shared, answers, self.limits, self.budgets)
                starts.append(fixed(found, 0))
                later = range(1 + len(self.limits), found.error.shape[1])
                for i, limit in enumerate(self.limits):
                    own = adaptive(found, 1 + i, limit, self.config.tolerance_draws)
                    modes.setdefault((ADAPTIVE, limit), []).append(own)
                    truth = by_truth(found, (0, *later), limit)
                    modes.setdefault((TRUTH, limit), []).append(truth)
                    state = with_tolerance(self._state(shared), limit)
                    kl.setdefault((ADAPTIVE, limit), []).append(self._kl(ADAPTIVE, state, answers))
                bar.update()
            wanted = self._equal_budgets(modes)
            for _, task, index in jobs:
                shared, answers = self._answer(task, index)
                for key, mode in self._fixed(shared, answers, wanted):
                    modes.setdefault(key, []).append(mode)
                for key, budget in wanted.items():
                    if key[0] != EQUAL["truth"]:
                        state = with_budget(self._state(shared), budget)
                        kl.setdefault(key, []).append(self._kl(FIXED, state, answers))
                bar.update()
        figures = []
        names = [name for name, _, _ in jobs]
        for limit in self.limits:
            print(f"## {self.length} tokens, tolerance {limit:g}\n")
            for part in ("all", *(tasks if len(tasks) > 1 else ())):
                inside = [i for i, name in enumerate(names) if part in ("all", name)]
                rows = [row_of("first budget", _of(starts, inside), limit, None)]
                for name in (ADAPTIVE, EQUAL["retrieved"], EQUAL["read"]):
                    mean = float(np.mean([kl[name, limit][i] for i in inside]))
                    rows.append(row_of(name, _of(modes[name, limit], inside), limit, mean))
                for name in (TRUTH, EQUAL["truth"]):
                    rows.append(row_of(name, _of(modes[name, limit], inside), limit, None))
                print(f"{part}:\n\n{report(rows, limit)}\n", flush=True)
                about = {"length": self.length, "tolerance": limit, "task": part}
                figures += [about | {"mode": row[0], "cells": row[1:]} for row in rows]
        return figures

    def _answer(self, task: Task, index: int) -> tuple[SharedPrefill, list[Answer]]:
        sample = task.sample(self.material, self.length, self.seed, index)
        return self.bench.answer(
            [sample], self.length, sampled=task.sampled, seed=self.seed, first=index
        )

    def _state(self, shared: SharedPrefill) -> DecodeState:
        # Both modes' have the same index: it is built once.
        return shared.state(self.bench.generators[ADAPTIVE])

    def _measure(
        self,
        shared: SharedPrefill,
        answers: list[Answer],
        limits: list[float],
        budgets: list[int],
    ) -> Measured:
        given = self.bench.generators[ADAPTIVE], self.bench.params, self._state(shared)
        return measure_budgets(*given, shared.dense, answers, limits, budgets, self.budgets[-1])

    def _kl(self, name: str, state: DecodeState, answers: list[Answer]) -> float:
        judged = judge(self.bench.generators[name], self.bench.params, state, answers)
        return float(judged.kl.mean())

    def _equal_budgets(self, modes: dict[tuple[str, float], list[Mode]]) -> dict:
        """Return the fixed budgets that equal the adaptive modes' means, at most the largest."""
        wanted = {}
        for limit in self.limits:
            own = Mode.joined(modes[ADAPTIVE, limit])
            truth = Mode.joined(modes[TRUTH, limit])
            for name, mean in (
                ("retrieved", own.rows.mean()),
                ("read", own.read.mean()),
                ("truth", truth.rows.mean()),
            ):
                wanted[EQUAL[name], limit] = min(round(float(mean)), self.budgets[-1])
        return wanted

    def _fixed(
        self, shared: SharedPrefill, answers: list[Answer], wanted: dict[tuple[str, float], int]
    ) -> list[tuple[tuple[str, float], Mode]]:
        """Measure fixed budgets, as many at once as the first measurement had."""
        keys, size, found = list(wanted), len(self.budgets), []
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            budgets = [wanted[key] for key in part]
            budgets += budgets[-1:] * (size - len(part))
            # Infinity is kept within at once.
            measured = self._measure(shared, answers, [math.inf] * len(self.limits), budgets)
            first = 1 + len(self.limits)
            found += [(key, fixed(measured, first + i)) for i, key in enumerate(part)]
        return found


def _of(parts: list[Mode], inside: list[int]) -> Mode:
    return Mode.joined([parts[i] for i in inside])


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
