"""Times a layer's attention of appended tokens: by `attend_appended`, and by cuDNN with plain JAX.

    python scripts/bench_appended.py --shapes smollm2,llama-3-8b --rooms 32768,122880 --out out.json

One sequence, whose room is full; the new rows are written too. Layers take turns, so that no cache
holds their rows. `--config` times the op by other configs as well. Whatever fails is told, and the
rest goes on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from bench_decode import parse_numbers, parse_words
from decode_model import SHAPES
from gpu_timing import device_facts, time_calls
from jax import Array

from models.config import ModelConfig
from models.errors import InputError
from pallas_kernels import Implementation, use_implementation
from pallas_kernels.attend_appended import triton
from wavejax import WaveAttention, WaveConfig
from wavejax.attention import appended
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.evaluation.files import write_growing
from wavejax.store.shape import CacheShape

QUESTION = 32  # Tokens of a piece that there are; the rest is padding, if it is longer.
ROWS = 2e8  # Bytes of rows that take turns: more than a GPU's cache holds.


def make_state(model: ModelConfig, room: int, layers: int) -> Any:
    """Make a state of some layers whose row store is full, of random rows."""
    shape = CacheShape(layers, model.num_kv_heads, model.head_dim)
    state = WaveAttention(WaveConfig(), "device").init_state(shape, 1, room, 1024, jnp.bfloat16)
    rows = state.store.rows
    random = jax.random.normal(jax.random.key(0, impl="unsafe_rbg"), rows.data.shape, jnp.bfloat16)
    stored = dataclasses.replace(state.store, rows=rows._replace(data=random))
    indexed = jnp.full(1, rows.data.shape[3], jnp.int32)
    index = dataclasses.replace(state.index, tokens=indexed)
    few = {"sink_tokens": jnp.full(1, 4, jnp.int32), "window_tokens": jnp.full(1, 200, jnp.int32)}
    steady = dataclasses.replace(state.steady, **few)
    return dataclasses.replace(state, store=stored, index=index, steady=steady)


def bench(
    model: ModelConfig, room: int, tokens: int, way: Implementation, seconds: float, turns: float
) -> dict[str, float]:
    """Time one way: us a layer, and the norm of what it gives, by which ways are compared."""
    jax.clear_caches()  # what is traced by a config that is tried
    row = 4 * model.num_kv_heads * model.head_dim
    layers = max(1, min(16, round(turns / (row * room))))
    state = make_state(model, room, layers)
    keys = jax.random.split(jax.random.key(1), 3)
    heads = model.num_heads, model.num_kv_heads, model.num_kv_heads
    given = tuple(
        jax.random.normal(key, (1, tokens, each, model.head_dim), jnp.bfloat16)
        for key, each in zip(keys, heads, strict=True)
    )
    count = min(QUESTION, tokens)

    def call(layer: Array, given: Any, state: Any) -> tuple[Array, Any]:
        with use_implementation(way):
            query, key, value = given
            numbers = {"sequence": jnp.int32(0), "count": jnp.int32(count)}
            return appended.append(layer, query, key, value, state, **numbers)

    output, _ = jax.jit(call)(jnp.int32(0), given, state)
    norm = float(jnp.linalg.norm(output[:, :count].astype(jnp.float32)))
    links = tuple(jnp.int32(i) for i in range(layers))
    took, _ = time_calls(call, given, state, links=links, calls=2 * layers, runs=3, seconds=seconds)
    return {"us": took.median * 1e6, "least_us": took.least * 1e6, "norm": norm}


def parse_config(text: str) -> triton.Config:
    """Return a config of the op, of all its numbers in their order."""
    numbers = [int(number) for number in parse_numbers("--config", text)]
    if len(numbers) != len(dataclasses.fields(triton.Config)):
        raise InputError(f"--config: {text!r} is not SPLITS,QUERIES,BLOCK,WARPS,STAGES")
    return triton.Config(*numbers)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shapes", default="smollm2,llama-3-8b", show_default=True)
@click.option("--rooms", default="32768", show_default=True, help="Rows of the sequence.")
@click.option("--tokens", default="32,64,128", show_default=True, help="Of a piece.")
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="SPLITS,QUERIES,BLOCK,WARPS,STAGES",
    help="A config of the op to time too.",
)
@click.option("--seconds", default=0.05, show_default=True, help="Of measurements, a way.")
@click.option("--turns", default=ROWS, show_default=True, help="Bytes of rows that take turns.")
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures here, as JSON.")
def command(
    shapes: str,
    rooms: str,
    tokens: str,
    configs: tuple[str, ...],
    seconds: float,
    turns: float,
    out: Path | None,
) -> None:
    """Time both ways."""
    names = parse_words("--shapes", shapes, tuple(SHAPES))
    asked = parse_numbers("--rooms", rooms), parse_numbers("--tokens", tokens)
    sizes = tuple([int(number) for number in numbers] for numbers in asked)
    tried = [parse_config(text) for text in configs]
    appended.MOST_TOKENS = max(sizes[1])  # the op for longer pieces too
    heuristic = triton.heuristic
    report: dict[str, Any] = device_facts() | {"pieces": []}
    cases = [(name, room, piece) for name in names for room in sizes[0] for piece in sizes[1]]
    for number, (name, room, piece) in enumerate(cases, 1):
        row: dict[str, Any] = {"shape": name, "room": room, "tokens": piece}
        ways: list[tuple[Implementation, Any]] = [("xla", None), ("triton", None)]
        for way, config in [*ways, *(("triton", config) for config in tried)]:
            triton.heuristic = heuristic if config is None else lambda *_, config=config: config
            label = "cudnn" if way == "xla" else "op" if config is None else str(config)
            try:
                found: Any = bench(SHAPES[name], room, piece, way, seconds, turns)
            except Exception as error:  # The other ways are still worth measuring.
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            row[label] = found
            print(name, room, piece, label, json.dumps(found), flush=True)
        report["pieces"].append(row)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_growing(out, json.dumps(report, indent=1), whole=number == len(cases))
    triton.heuristic = heuristic


main = main_guard(command, advice="use a smaller shape, or a smaller room")

if __name__ == "__main__":
    exit_process(main())
