"""Evaluates ways to decode by RULER's tasks and others, at one budget of tokens.

    python scripts/evaluate.py --tasks ruler --lengths 4096 --samples 50 --out results

Every sample is read once, densely; then full attention answers, each method is forced to say that
answer and compared token by token, and each answers by itself and is scored. A stopped run goes on
where it was when the same command is given again: what the batch in progress has not written is
lost, with --batch 1 at most one sample.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
from evaluation_options import dtype_option, haystack_option, seed_option
from tqdm import tqdm

from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.cli.progress import progress_bar
from wavejax.config import WaveConfig
from wavejax.evaluation import plots
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.cost_report import (
    panels_of,
    plot_kl_by_bytes,
    points_of,
    summarise_costs,
)
from wavejax.evaluation.files import write_text
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.methods import DEFAULT_METHODS, METHODS, parse_methods
from wavejax.evaluation.origins import parts_of, settings_of
from wavejax.evaluation.records import Records, blocks
from wavejax.evaluation.samples import Material, Task
from wavejax.evaluation.setup import Subject, open_subject, parse_numbers, run_facts
from wavejax.evaluation.summary import summarise, tabulate
from wavejax.evaluation.tasks import TASKS, parse_tasks
from wavejax.store.shape import CacheShape

# Longer answers take so much memory for full attention's logits that fewer fit side by side.
LONG_ANSWER = 512
LONG_ANSWER_BATCH = 2
DEFAULTS = WaveConfig()


@click.command(
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    epilog=f"Tasks: ruler (eleven of its thirteen), {', '.join(TASKS)}.  "
    "Methods: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()),
)
@click.option("--model", help="As for wavejax.generate.  [default: the installed SmolLM2]")
@click.option("--tasks", default="ruler", show_default=True, help="Names, separated by commas.")
@click.option("--lengths", default="4096", show_default=True, help="Tokens, prompt and answer.")
@click.option(
    "--methods",
    default=",".join(DEFAULT_METHODS),
    help="Names, separated by commas, with settings if wanted: "
    "full,wave,wave[cluster_size=16,candidate_fraction=0.1]  [default: all but ablation]",
)
@click.option("--samples", type=click.IntRange(1), default=50, show_default=True)
@click.option("--out", type=Path, required=True, help="Folder of the results.")
@click.option(
    "--retrieval-fraction",
    type=float,
    default=DEFAULTS.retrieval_fraction,
    show_default=True,
    help="Every method's budget: the share of tokens retrieved.",
)
@click.option(
    "--min-retrieved-tokens",
    type=int,
    default=DEFAULTS.min_retrieved_tokens,
    show_default=True,
    help="Every method's budget: the least number of them.",
)
@haystack_option
@seed_option
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@dtype_option
@click.option(
    "--answers/--no-answers",
    default=True,
    show_default=True,
    help="Also let each method answer by itself, for scores; half the time without.",
)
@click.option("--unroll/--no-unroll", default=False, help="Faster steps, slower to compile.")
@click.option("--plots/--no-plots", "plotted", default=True, show_default=True)
@click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr.  [default: if it is a terminal]"
)
def command(
    model: str | None,
    tasks: str,
    lengths: str,
    methods: str,
    samples: int,
    out: Path,
    retrieval_fraction: float,
    min_retrieved_tokens: int,
    haystack: tuple[str, ...],
    seed: int,
    batch: int,
    dtype: str,
    answers: bool,
    unroll: bool,
    plotted: bool,
    progress: bool | None,
) -> None:
    """Compare ways to decode on long prompts; print tables, and write them with plots to a folder.

    The folder gets records.jsonl (a line for each sample and method), settings.json, summary.md and
    the plots.
    """
    # All that can be wrong with the input is found before the weights are read.
    budget = {
        "retrieval_fraction": retrieval_fraction,
        "min_retrieved_tokens": min_retrieved_tokens,
    }
    attentions = parse_methods(methods, budget)
    chosen, sizes = parse_tasks(tasks), parse_numbers(lengths, int, "lengths")
    tabulate()  # Not to be found missing after hours.
    if plotted:
        plots.pyplot()
    subject = open_subject(model, dtype)
    material = Material(subject.tokenizer, load_haystack(haystack))
    firsts = {}
    for length in sizes:
        subject.check_length(length)
        for name, task in chosen.items():
            firsts[name, length] = task.sample(material, length, seed, 0)
    settings = {
        **settings_of(subject, material, seed),
        "answers": answers,
        "defaults": dataclasses.asdict(DEFAULTS),
        **budget,
    }
    batches = {name: min(batch, batch_of(task)) for name, task in chosen.items()}
    parts = parts_of(chosen, firsts, batches, unroll, subject.cache_shape)
    folder = Records(out, settings, run_facts(), parts)
    records = click.get_current_context().with_resource(folder)

    jobs = [
        (name, length, block)
        for length in sizes
        for name, task in chosen.items()
        for block in blocks(samples, batches[name], even=not task.sampled)
    ]
    shown = sys.stderr.isatty() if progress is None else progress
    bench = None
    with tqdm(
        total=len(sizes) * len(chosen) * samples * len(attentions),
        initial=0,
        unit="sample",
        file=sys.stderr,
        disable=not shown,
    ) as bar:
        for name, length, block in jobs:
            inside = [index for index in block if index < samples]
            missing = [
                method
                for method in attentions
                if any((name, length, index, method) not in records.done for index in inside)
            ]
            bar.set_description(f"{name} {length}")
            bar.update(len(inside) * (len(attentions) - len(missing)))
            if not missing:
                continue
            if bench is None:
                bench = load_bench(subject, attentions, answers, unroll, shown)
            # The last batch is filled up with samples of which no record is kept.
            made = [chosen[name].sample(material, length, seed, index) for index in block]
            marks = [sample.sha256 for sample in made]
            for index, mark in zip(inside, marks, strict=False):
                records.check_sample(name, length, index, mark)
            sampled = chosen[name].sampled
            running = bench.run(made, length, missing, sampled=sampled, seed=seed, first=block[0])
            for method, figures in running:
                records.append(
                    {"task": name, "length": length, "index": index, "method": method}
                    | {"sample": mark, **dataclasses.asdict(of_sample)}
                    for index, mark, of_sample in zip(block, marks, figures, strict=True)
                    if index < samples and (name, length, index, method) not in records.done
                )
                bar.update(len(inside))
    report(records, out, plotted, subject.cache_shape, settings)


def batch_of(task: Task) -> int:
    """Return the most samples of a task that are run side by side."""
    return LONG_ANSWER_BATCH if task.new_tokens >= LONG_ANSWER else 2**31


def load_bench(
    subject: Subject, attentions: dict, answers: bool, unroll: bool, shown: bool
) -> Bench:
    """Read the weights."""
    with progress_bar("loading the model", shown) as progress:
        params = subject.checkpoint.load_params(subject.dtype, progress)
    return Bench(
        subject.checkpoint.config,
        params,
        subject.tokenizer,
        attentions,
        stop_tokens=subject.stop_tokens,
        answers=answers,
        unroll=unroll,
    )


def report(
    records: Records, out: Path, plotted: bool, shape: CacheShape, settings: dict[str, Any]
) -> None:
    """Print and write the tables, and the plots."""
    points, unknown = points_of(records.records, shape, settings)
    text = f"{summarise(records.records)}\n{summarise_costs(points, unknown)}"
    print(text, end="")
    write_text(out / "summary.md", text)
    if not plotted:
        return
    if points:
        plot_kl_by_bytes(panels_of(settings["model"], points), out / "kl_by_bytes.png")
    if any(record["score"] is not None for record in records.records):
        plots.plot_scores(records.records, out / "score_by_length.png")
    drift = plots.kl_by_position(records.records)
    if drift:
        plots.plot_by_position(
            drift, 128, "KL from full attention, nats", out / "kl_by_position.png", log=True
        )


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
