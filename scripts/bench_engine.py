"""Measures the batch engine on one device, each part beside what it replaces.

    python scripts/bench_engine.py --shape llama-3-8b --prompt-tokens 30720 --out engine.json

- busy: tokens a second with all slots busy, over `Generator.decode_n` alone. One prompt for all,
  which is read once: then all slots begin at about the same time.
- unequal: answers of 1/32 to all of `--new-tokens`, eight for each slot: seconds of static batches
  over the engine's. Prompts are read within both.
- stall: the longest gap in an answer while a prompt of `--long-tokens` is read, over
  `--max-stall-ms`.
- document: seconds to the first token of another question to a text that a slot still holds
  (`reuse_slots`), over those of reading the text. `kept_s` is that of a text kept on disk;
  `loaded_s` begins with the folder, as after a restart whose programs are compiled.

Weights and prompts are random. A part that fails is recorded, and the others go on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import engine_parts
import jax
from bench_decode import dtype_option, parse_words
from decode_model import SHAPES, random_params
from engine_parts import Setting
from gpu_timing import device_facts
from rich.console import Console
from rich.table import Table

from models.unstacked import unstack_layers
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig
from wavejax.attention.protocol import AnyAttention
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.cli.options import fields_of, options_from
from wavejax.evaluation.files import write_growing
from wavejax.planning.free_memory import set_memory_limits
from wavejax.planning.plan import STAGING_BYTES

PARTS = ("busy", "unequal", "stall", "document")
COUNT = click.IntRange(min=1)


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option("--shape", type=click.Choice([*SHAPES]), default="llama-3-8b", show_default=True)
@click.option("--attention", type=click.Choice(["wave", "full"]), default="wave", show_default=True)
@click.option("--prompt-tokens", type=COUNT, default=30720, show_default=True)
@click.option("--long-tokens", type=COUNT, default=61440, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=32), default=256, show_default=True)
@click.option("--slots", type=COUNT, default=8, show_default=True)
@click.option(
    "--max-stall-ms", type=click.FloatRange(0, min_open=True), default=250.0, show_default=True
)
@click.option("--parts", default=",".join(PARTS), show_default=True)
@dtype_option
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures here, as JSON.")
@options_from(WaveConfig)
def command(
    shape: str,
    attention: str,
    prompt_tokens: int,
    long_tokens: int,
    new_tokens: int,
    slots: int,
    max_stall_ms: float,
    parts: str,
    dtype: str,
    out: Path | None,
    **settings: Any,
) -> None:
    """Time the batch engine's work."""
    config: WaveConfig = fields_of(WaveConfig, settings)
    wanted = parse_words("--parts", parts, PARTS)
    kind: AnyAttention = (
        DenseAttention(row_dtype=config.row_dtype)
        if attention == "full"
        else WaveAttention(config, "device")
    )
    set_memory_limits(STAGING_BYTES)  # no store of rows; before anything starts JAX's device
    gpu = jax.default_backend() == "gpu"
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    params = random_params(SHAPES[shape], dtype)
    if gpu:
        params = unstack_layers(params)  # as the commands do
    setting = Setting(
        Generator(SHAPES[shape], kind),
        params,
        prompt_tokens=prompt_tokens,
        long_tokens=long_tokens,
        new_tokens=new_tokens,
        slots=slots,
        max_stall_ms=max_stall_ms,
    )
    report: dict[str, Any] = device_facts() | {
        **{name: getattr(setting, name) for name in ("prompt_tokens", "long_tokens", "new_tokens")},
        "shape": shape,
        "attention": attention,
        "slots": slots,
        "dtype": dtype,
        "wave": dataclasses.asdict(config) if attention == "wave" else None,
        "parts": {},
    }
    for name in wanted:
        try:
            found = getattr(engine_parts, name)(setting)
        except Exception as error:  # The other parts are still worth measuring.
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        report["parts"][name] = found
        print(json.dumps({name: found}), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_growing(out, json.dumps(report, indent=1), whole=name == wanted[-1])
    print_table(report["parts"])


def print_table(parts: dict[str, dict[str, Any]]) -> None:
    """Print a line for each part."""
    table = Table("part", "ratio", "figures", box=None, pad_edge=False)
    for name, found in parts.items():
        ratio = f"{found['ratio']:.3g}" if "ratio" in found else "failed"
        rest = (f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float))
        table.add_row(name, ratio, found.get("error") or ", ".join(rest))
    Console(width=160).print(table)


main = main_guard(command, advice="use a smaller shape, shorter prompts or fewer slots")

if __name__ == "__main__":
    exit_process(main())
