"""Measures attention itself: recall of mass and output error, by layer, head, budget and length.

    python scripts/report_attention.py --lengths 8192 --samples 4 --out attention

Full attention answers; at each budget every method then attends to the same queries, step by step.
With --tasks drift the answers are 2,048 tokens long, and the figures come by generated length too.
A stopped report goes on where it was when the same command is given again.
"""

import dataclasses
import sys
from pathlib import Path

import click
from evaluation_options import dtype_option, haystack_option, seed_option
from tqdm import tqdm

from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.cli.progress import progress_bar
from wavejax.config import WaveConfig
from wavejax.evaluation import attention_report, plots
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.cost_report import NO_FLOORS
from wavejax.evaluation.files import write_text
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.methods import parse_methods
from wavejax.evaluation.origins import parts_of, settings_of
from wavejax.evaluation.records import Records
from wavejax.evaluation.samples import Material
from wavejax.evaluation.setup import open_subject, parse_numbers, run_facts
from wavejax.evaluation.summary import tabulate
from wavejax.evaluation.tasks import parse_tasks


@click.command(
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.option("--model", help="As for wavejax.generate.  [default: the installed SmolLM2]")
@click.option("--tasks", default="niah_multikey_1,vt,fwe", show_default=True)
@click.option("--lengths", default="4096", show_default=True, help="Tokens, prompt and answer.")
@click.option("--methods", default="oracle,quest,paper,wave", show_default=True)
@click.option(
    "--budgets",
    default="0.0045,0.009,0.018,0.036",
    show_default=True,
    help="Shares of the tokens retrieved; no floor under them.",
)
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True)
@click.option("--out", type=Path, required=True, help="Folder of the results.")
@haystack_option
@seed_option
@dtype_option
@click.option("--plots/--no-plots", "plotted", default=True, show_default=True)
@click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr.  [default: if it is a terminal]"
)
def command(
    model: str | None,
    tasks: str,
    lengths: str,
    methods: str,
    budgets: str,
    samples: int,
    out: Path,
    haystack: tuple[str, ...],
    seed: int,
    dtype: str,
    plotted: bool,
    progress: bool | None,
) -> None:
    """Measure methods' attention beside full attention's; print tables, and write plots.

    The folder gets records.jsonl (a line for each sample, method and budget), settings.json,
    summary.md and the plots.
    """
    chosen, sizes = parse_tasks(tasks), parse_numbers(lengths, int, "lengths")
    attentions, facts = {}, {}
    for fraction in parse_numbers(budgets, float, "budgets"):
        budget = {"retrieval_fraction": fraction, **NO_FLOORS}
        for name, attention in parse_methods(methods, budget).items():
            if type(attention) is DenseAttention:
                raise InputError(f"{name} is what the methods are compared with: leave it out")
            attentions[f"{name} at {fraction:g}"] = attention
            facts[f"{name} at {fraction:g}"] = {"name": name, "fraction": fraction}
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
        "report": "attention",
        **settings_of(subject, material, seed),
        "defaults": dataclasses.asdict(WaveConfig()),
    }
    alone = dict.fromkeys(chosen, 1)
    parts = parts_of(chosen, firsts, alone, unroll=False, shape=subject.cache_shape)
    folder = Records(out, settings, run_facts(), parts)
    records = click.get_current_context().with_resource(folder)

    shown = sys.stderr.isatty() if progress is None else progress
    with progress_bar("loading the model", shown) as report:
        params = subject.checkpoint.load_params(subject.dtype, report)
    bench = Bench(
        subject.checkpoint.config,
        params,
        subject.tokenizer,
        attentions,
        stop_tokens=subject.stop_tokens,
    )
    total = len(sizes) * len(chosen) * samples * len(attentions)
    with tqdm(total=total, unit="sample", file=sys.stderr, disable=not shown) as bar:
        for length in sizes:
            for task_name, task in chosen.items():
                bar.set_description(f"{task_name} {length}")
                for index in range(samples):
                    key = {"task": task_name, "length": length, "index": index}
                    missing = [
                        method
                        for method in attentions
                        if (task_name, length, index, method) not in records.done
                    ]
                    bar.update(len(attentions) - len(missing))
                    if not missing:
                        continue
                    sample = task.sample(material, length, seed, index)
                    records.check_sample(task_name, length, index, sample.sha256)
                    measured = attention_report.measure(
                        *(bench, sample, length, missing),
                        sampled=task.sampled,
                        seed=seed,
                        index=index,
                    )
                    key["sample"] = sample.sha256
                    for method, figures in measured:
                        record = {"method": method, **facts[method]} | dataclasses.asdict(figures)
                        records.append([key | record])
                        bar.update()
    text = attention_report.summarise(records.records)
    print(text, end="")
    write_text(out / "summary.md", text)
    if plotted:
        attention_report.plot_all(records.records, out)


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
