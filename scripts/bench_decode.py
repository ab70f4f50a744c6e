"""Decodes with full and with wave attention: the same weights, in the same run.

    python scripts/bench_decode.py --contexts 30720,61440,122880 --batches 1,max --out results.json

By itself it takes random weights of Llama-3-8B's shape, and caches of random keys and values, whose
index is built as a prompt's is. `--prefill real` reads random prompts instead and times that.
Wave attention's row cache is made to hit as often as `--hit-ratio` says, by feeding tokens that are
as much alike as it takes. With `--row-dtype int8` full attention is timed in both dtypes. Other
systems' ways of decoding are timed by `--baselines`, see `host_managed` and `torch_baseline`.
Whatever fails is recorded, and the rest goes on; the results are written after each configuration,
to NAME.unfinished.json until all are there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import click
import jax
from decode_baselines import HostManagedBaseline
from decode_configurations import CALLS, Bench, pinned_bytes
from decode_model import SHAPES, memory_of, random_params, with_smooth_embedding
from decode_report import BASELINES, plot, print_table
from decode_run import Choice, Report, jobs_of, run_jobs, time_outsider
from decode_timing import steps_needed
from gpu_timing import copy_ceiling, device_facts

from models.checkpoints.open import open_checkpoint
from models.checkpoints.tensor_source import WEIGHT_DTYPES
from models.errors import InputError
from models.formats import formats_of_dtype
from models.unstacked import unstack_layers
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.cli.entry import exit_process
from wavejax.cli.explaining import HELP, check_variable, print_explanation
from wavejax.cli.guard import main_guard
from wavejax.cli.options import fields_of, options_from
from wavejax.planning.free_memory import free_memory, set_memory_limits


def parse_numbers(option: str, text: str, words: tuple[str, ...] = ()) -> list[int | str]:
    """Numbers of at least 1, or any of the words, between commas; raises InputError."""
    found: list[int | str] = []
    for part in text.split(","):
        if part in words:
            found.append(part)
        elif part.isdigit() and int(part) > 0:
            found.append(int(part))
        else:
            also = f" or any of {', '.join(words)}" if words else ""
            raise InputError(f"{option}: {part!r} is no number from 1 up{also}")
    return found


def parse_words(option: str, text: str, words: tuple[str, ...]) -> list[str]:
    """Return some of the words, between commas; raise InputError."""
    found = text.split(",")
    for part in found:
        if part not in words:
            raise InputError(f"{option}: {part!r} is none of {', '.join(words)}")
    return found


def wave_attention(config: WaveConfig, place: str) -> WaveAttention:
    """Wave attention with its rows where `--store` says."""
    if place == "device":
        return WaveAttention(config, "device")
    return WaveAttention(config, "host", "staged" if place == "staged" else "in_place")


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, bfloat16 on a GPU.",
)


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option("--shape", type=click.Choice([*SHAPES]), default="llama-3-8b", show_default=True)
@click.option("--model", help="A checkpoint in place of random weights; its embedding is replaced.")
@click.option("--model-layers", type=click.IntRange(min=1), help="To make the shape smaller.")
@click.option("--contexts", default="30720,61440,122880", show_default=True)
@click.option(
    "--batches",
    default="1,max",
    show_default=True,
    help="Numbers; max: the most that each attention has room for; common: that all have room for.",
)
@click.option("--attention", "attentions", default="full,wave", show_default=True)
@click.option(
    "--store",
    "stores",
    default="device,host",
    show_default=True,
    help="Where wave attention's rows are. host: read in place; staged: on the host too, gathered "
    "there and sent.",
)
@click.option(
    "--baselines",
    "others",
    default="",
    help="Also time, between commas: host-managed, pages of keys and values in host memory, "
    "gathered there; host-managed-ahead, which guesses them a layer early; transformers, its Llama "
    "in PyTorch.  [default: none]",
)
@click.option("--steps", type=click.IntRange(min=1), default=32, show_default=True, help="A call.")
@click.option(
    "--hit-ratio",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Of the row cache; rows on the device have none.",
)
@click.option(
    "--prefill",
    type=click.Choice(["synthetic", "real"]),
    default="synthetic",
    show_default=True,
    help="synthetic: random keys and values, indexed; real: random prompts, read by the model.",
)
@click.option(
    "--unroll/--no-unroll",
    default=None,
    help="Write all layers out: compiles longer, runs faster.  [default: on a GPU]",
)
@click.option("--growth", is_flag=True, help="Also time a step in which the index grows.")
@click.option("--profile", "traces", type=click.Path(path_type=Path), help="Folder for traces.")
@dtype_option
@click.option(
    "--weight-dtype",
    type=click.Choice(WEIGHT_DTYPES),
    default="model",
    show_default=True,
    help="Of the weights' matrices; packed: of a GGUF file by --model.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures here, as JSON.")
@click.option("--explain", "explained", is_flag=True, help=HELP)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Tokens/s by context.")
@options_from(WaveConfig)
def command(
    shape: str,
    model: str | None,
    model_layers: int | None,
    contexts: str,
    batches: str,
    attentions: str,
    stores: str,
    others: str,
    steps: int,
    hit_ratio: float,
    prefill: str,
    unroll: bool | None,
    growth: bool,
    traces: Path | None,
    dtype: str,
    weight_dtype: str,
    out: Path | None,
    explained: bool,
    plot_path: Path | None,
    **settings: Any,
) -> None:
    """Time whole decode steps of full and of wave attention.

    With --row-dtype int8 full attention is timed twice: as it is, and with keys and values in int8.
    """
    check_variable()
    config: WaveConfig = fields_of(WaveConfig, settings)
    lengths = [int(x) for x in parse_numbers("--contexts", contexts)]
    sizes = parse_numbers("--batches", batches, ("max", "common"))
    kinds = parse_words("--attention", attentions, ("full", "wave"))
    places = parse_words("--store", stores, ("device", "host", "staged"))
    named = parse_words("--baselines", others, tuple(BASELINES)) if others else []
    checkpoint = None if model is None else open_checkpoint(model)
    if checkpoint is not None and model_layers is not None:
        raise InputError("--model-layers makes a shape smaller, not a checkpoint: leave out one")
    sizes_of = SHAPES[shape] if checkpoint is None else checkpoint.config
    if checkpoint is None and weight_dtype == "packed":
        raise InputError("--weight-dtype packed is for a GGUF file: give one by --model")
    if checkpoint is None:
        formats = formats_of_dtype(SHAPES[shape], weight_dtype)
    else:
        formats = dict(checkpoint.formats(weight_dtype))
    if model_layers is not None:
        sizes_of = dataclasses.replace(sizes_of, num_layers=model_layers)
    choices: list[Choice] = []
    if "full" in kinds:
        choices.append(("full", None, DenseAttention()))
        if config.row_dtype != "model":
            alike = DenseAttention(row_dtype=config.row_dtype)
            choices.append((f"full-{config.row_dtype}", None, alike))
    if "wave" in kinds:
        choices += [("wave", place, wave_attention(config, place)) for place in places]
    for name in named:
        if name != "transformers":
            baseline = HostManagedBaseline(config, ahead=name == "host-managed-ahead")
            baseline.budget(min(lengths))  # InputError if there is nothing to fetch
            choices.append((name, None, baseline))
    new_tokens = steps_needed(steps, CALLS) + (4 * config.growth_tokens if growth else 0)

    # Before anything starts JAX's device.
    stored = "bfloat16" if dtype == "auto" else dtype  # as on a GPU; others pin nothing
    report = Report(out)
    report.content |= {
        "model": sizes_of.to_json() | {"name": model or shape},
        "weight_dtype": weight_dtype,
        "steps": steps,
        "calls": CALLS,
        "unroll": unroll,
        "wave": dataclasses.asdict(config),
    }
    report.keep()
    if "transformers" in named:
        choices += time_outsider(sizes_of, stored, steps, lengths, sizes, report)
    all_kinds = [attention for _, _, attention in choices]
    set_memory_limits(pinned_bytes(sizes_of, all_kinds, max(lengths), sizes, new_tokens, stored))
    gpu = jax.default_backend() == "gpu"
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    copy = copy_ceiling(2.0 if gpu else 0.01)
    facts: dict[str, Any] = device_facts() | {"dtype": dtype, "copy": copy}
    report.content |= facts
    print({name: facts[name] for name in ("device", "jax", "date", "copy")}, flush=True)
    if checkpoint is None:
        params = random_params(sizes_of, dtype, formats=formats)
    else:
        loaded = checkpoint.load_params(dtype, None, weight_dtype)
        params = with_smooth_embedding(sizes_of, loaded)
    if gpu if unroll is None else unroll:
        params = unstack_layers(params)  # as the commands do
    jax.block_until_ready(params)
    bench = Bench(
        model=sizes_of,
        params=params,
        dtype=dtype,
        new_tokens=new_tokens,
        steps=steps,
        hit_ratio=hit_ratio,
        real_prefill=prefill == "real",
        unroll=unroll,
        growth=growth,
        profile=traces,
        ceiling=copy["best"],
        free=free_memory(),
    )
    free = dataclasses.asdict(bench.free)
    report.content |= {"weight_bytes": memory_of(params), "free": free}
    results = run_jobs(bench, jobs_of(bench, choices, lengths, sizes), report)
    report.keep(whole=True)
    print_table(results)
    if explained:
        print_explanation()
    if plot_path is not None:
        plot(results, plot_path)


main = main_guard(command, advice="use a smaller shape, fewer layers or a shorter context")

if __name__ == "__main__":
    exit_process(main())
