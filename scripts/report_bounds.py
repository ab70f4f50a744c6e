"""Reports how useful the bounds of the estimate are: bound against true error, on a real model.

    python scripts/report_bounds.py --tasks fwe,niah_multiquery --length 2048 --samples 1

Full attention answers; in each step and layer wave attention with moments attends to the same
queries, and its bounds are held to the truth. Prints a table for each rank of the moments.
"""

import dataclasses

import click
import numpy as np

from models.errors import InputError
from wavejax.attention.wave import WaveAttention
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.config import WaveConfig
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.bounds_probe import measure_bounds
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.samples import Material
from wavejax.evaluation.setup import open_subject, parse_numbers
from wavejax.evaluation.summary import table
from wavejax.evaluation.tasks import parse_tasks

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
TOLERANCES = (0.2, 0.1, 0.05)


@click.command(
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.option("--model", help="As for wavejax.generate.  [default: the installed SmolLM2]")
@click.option("--tasks", default="fwe,niah_multiquery", show_default=True)
@click.option("--length", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True)
@click.option("--ranks", default="1,4", show_default=True, help="Of the moments: 1, 2, 4.")
@click.option("--retrieved", type=click.IntRange(0), default=64, show_default=True)
@click.option("--cluster-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=int, default=42, show_default=True, help="Of the samples.")
def command(
    model: str | None,
    tasks: str,
    length: int,
    samples: int,
    ranks: str,
    retrieved: int,
    cluster_size: int,
    seed: int,
) -> None:
    """Hold the bounds of the estimate to the truth on a model's own queries; print tables."""
    chosen = parse_tasks(tasks)
    subject = open_subject(model, "float32")
    subject.check_length(length)
    material = Material(subject.tokenizer, load_haystack())
    config = WaveConfig(
        bounds=True,
        moment_rank=1,
        min_retrieved_tokens=retrieved,
        retrieval_fraction=0.0,
        cluster_size=cluster_size,
        max_cluster_size=2 * cluster_size,
        min_clusters=0,
    )
    if config.indexed_tokens(length) <= retrieved:
        least = config.sink_tokens + max(config.window_tokens, config.local_tokens + retrieved + 1)
        raise InputError(
            f"--length is {length}, of which nothing is estimated; it must be {least} or more"
        )
    attentions = {
        f"rank {rank}": WaveAttention(dataclasses.replace(config, moment_rank=rank), "device")
        for rank in parse_numbers(ranks, int, "ranks")
    }
    params = subject.checkpoint.load_params(subject.dtype)
    bench = Bench(
        subject.checkpoint.config,
        params,
        subject.tokenizer,
        attentions,
        stop_tokens=subject.stop_tokens,
    )
    for task_name, task in chosen.items():
        figures: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in attentions}
        for index in range(samples):
            sample = task.sample(material, length, seed, index)
            shared, answers = bench.answer([sample], length, first=index)
            for name in attentions:
                generator = bench.generators[name]
                figures[name].append(measure_bounds(generator, params, shared, answers))
        for name, found in figures.items():
            together = {
                key: np.concatenate([one[key].ravel() for one in found]).astype(np.float64)
                for key in found[0]
            }
            print(f"## {task_name}, {length} tokens, {name}\n\n{summarise(together)}\n")


def summarise(found: dict[str, np.ndarray]) -> str:
    """Make a table of quantiles over heads, layers and steps; heads that estimate nothing left out.

    Args:
        found: by the names of `bounds_probe.FIGURES`, flat.
    """
    kept = found["log_true"] > -1e29
    if not kept.any():
        return "No head estimates anything: give a larger --length, or a smaller --retrieved."
    found = {name: values[kept] for name, values in found.items()}
    true = found["log_true"]
    relative = np.maximum(found["error"], 1e-9) / found["norm"]
    slack = 1e-3
    broken = (
        (found["log_low"] > true + slack)
        | (found["log_high"] < true - slack)
        | (found["error"] > found["error_bound"] + slack * found["norm"])
    )
    rows = {
        "share of all mass that is estimated": np.exp(true - found["log_all"]),
        "true mass over its lower bound": np.exp(true - found["log_low"]),
        "upper bound over true mass, logarithm to base 10": (found["log_high"] - true) / np.log(10),
        "estimated over true mass": np.exp(found["log_estimate"] - true),
        "true relative error": found["error"] / found["norm"],
        "bound of the relative error": found["error_bound"] / found["norm"],
        "bound over true error": found["error_bound"] / np.maximum(found["error"], 1e-9),
        "sampled bound of the relative error": found["sampled_bound"],
        "sampled bound over true error": found["sampled_bound"] / relative,
    }
    lines = [
        [name, *(f"{value:.3g}" for value in np.quantile(values, QUANTILES))]
        for name, values in rows.items()
    ]
    text = table(["figure", *(f"{quantile:.0%}" for quantile in QUANTILES)], lines)
    useful = np.mean(found["error_bound"] < 0.5 * found["norm"])
    certain = f"violated: {broken.sum()}; bound below 50 %: {useful:.1%}"
    covered = np.mean(found["sampled_bound"] >= relative)
    met = []
    for tolerance in TOLERANCES:
        said, wrong = found["sampled_bound"] <= tolerance, relative > tolerance
        met.append(
            [
                *(f"{tolerance:g}", f"{np.mean(said):.1%}", f"{np.mean(~wrong):.1%}"),
                f"{np.mean(said & wrong):.2%}",
            ]
        )
    names = ["tolerance", "sampled bound within", "error within", "bound within, error not"]
    return (
        f"{text}\n\n{kept.sum()} heads; {certain}; sampled bound holds: {covered:.1%}\n\n"
        f"{table(names, met)}"
    )


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
