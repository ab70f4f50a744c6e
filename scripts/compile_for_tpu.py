"""Compile a model's decode step for a TPU that is not there, and print what memory it takes.

    python scripts/compile_for_tpu.py --chip v6e --model llama-3-8b --tokens 32768

Wants `libtpu`, and no TPU. Nothing of the model's size is allocated: weights and state are shapes.
With `--fetch staged` the rows are in the host's memory, and the step is the programs of a layer.
With `--kernels` each op that has a kernel for TPUs is a program, for several shapes of heads.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

# Must come before JAX is imported: the machine has no TPU to ask about, and none to start.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling alone, several may
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from decode_model import SHAPES
from jax.experimental import topologies

import pallas_kernels as ops
from models.config import ModelConfig
from models.parameters import nest, parameter_shapes
from pallas_kernels import backend, use_implementation
from pallas_kernels.shapes import StepShape
from pallas_kernels.testing import make_step
from pallas_kernels.types import Estimate, Picks, Rows, SteadyRows, StoredRows
from wavejax import Generator, WaveAttention
from wavejax.engine import compiled, staged_programs
from wavejax.engine.prompts import bucket
from wavejax.engine.state import DecodeState
from wavejax.store.shape import CacheShape

DTYPE = jnp.bfloat16
# Of the kernels alone: head dim, query heads that share a kv head, dtype.
HEADS = (64, 3, "bfloat16"), (96, 7, "float32"), (128, 5, "bfloat16"), (256, 16, "float32")
# The smallest topology of each chip, and the bytes of a chip's memory that XLA gives a program.
CHIPS = {"v5e": ("v5e:2x2", 15.75 * 2**30), "v6e": ("v6e:2x2", 31.25 * 2**30)}


def main() -> None:
    """Compile the programs of a step, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--model", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fetch", choices=["none", "staged"], default="none")
    parser.add_argument("--kernels", action="store_true", help="the kernels alone")
    parser.add_argument("--plain", action="store_true", help="plain JAX in place of the kernels")
    args = parser.parse_args()
    try:
        topology, memory = CHIPS[args.chip]
        chip = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    except Exception as error:
        sys.exit(f"error: no TPU to compile for: {error}; install libtpu")
    sharding = jax.sharding.SingleDeviceSharding(chip)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    model = SHAPES[args.model]
    implementation: ops.Implementation = "xla" if args.plain else "auto"
    if args.kernels:
        programs = _kernels()
    elif args.fetch == "staged":
        programs = _staged(model, args.tokens, args.batch)
    else:
        programs = _one_program(model, args.tokens, args.batch)
    for name, function, settings, operands in programs:
        start = time.perf_counter()
        with backend.traced_for_tpu(), use_implementation(implementation):
            lowered = function.trace(*settings, *jax.tree.map(placed, operands)).lower(
                lowering_platforms=("tpu",)
            )
        taken = lowered.compile().memory_analysis()
        results = taken.output_size_in_bytes - taken.alias_size_in_bytes
        parts = taken.argument_size_in_bytes, results, taken.temp_size_in_bytes
        facts = {
            "chip": args.chip,
            "program": name,
            "kernels": sorted(set(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))),
            **dict(zip(("arguments", "results", "temporaries"), parts, strict=True)),
            "bytes": sum(parts) + taken.generated_code_size_in_bytes,
            "memory": int(memory),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(facts), flush=True)


def _shapes(model: ModelConfig, attention: WaveAttention, tokens: int, batch: int) -> Any:
    """Return weights and a decode state, as shapes."""
    shapes = parameter_shapes(model)
    params = {"params": nest({at: jax.ShapeDtypeStruct(x, DTYPE) for at, x in shapes.items()})}

    def start() -> DecodeState:
        cache = attention.init_state(CacheShape.of(model), batch, bucket(tokens), 1024, DTYPE)
        logits = jnp.zeros((batch, model.vocab_size), jnp.float32)
        zero = jnp.zeros(batch, jnp.int32)
        return DecodeState(cache, logits, jnp.zeros(batch, bool), zero, zero)

    return params, jax.eval_shape(start)


def _one_program(model: ModelConfig, tokens: int, batch: int) -> Iterator[Any]:
    """Yield one program of any number of steps, with the rows in the TPU's own memory."""
    engine = Generator(model, WaveAttention(store="device"), unroll=False).engine
    params, state = _shapes(model, engine.attention, tokens, batch)  # type: ignore[arg-type]
    steps = jax.ShapeDtypeStruct((), jnp.int32)

    def decode(params: Any, state: Any, steps: Any) -> Any:
        return compiled.decode_n(engine, params, state, steps, 8)

    yield "decode_n", jax.jit(decode, donate_argnums=1), (), (params, state, steps)


def _staged(model: ModelConfig, tokens: int, batch: int) -> Iterator[Any]:
    """Yield what Python runs in each layer, with the rows in the host's memory."""
    attention = WaveAttention(store="host", fetch="staged")
    params, state = _shapes(model, attention, tokens, batch)
    wave, layer = state.attention_state, jax.ShapeDtypeStruct((), jnp.int32)
    hidden = jax.ShapeDtypeStruct((batch, 1, model.hidden_size), DTYPE)
    positions = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    inputs = params, layer, hidden, positions, wave
    yield "select", staged_programs.select, (model, attention), inputs
    select = functools.partial(staged_programs.select, model, attention)
    selection, missed, slots, _ = jax.eval_shape(select, *inputs)
    yield "attend", staged_programs.attend, (attention,), (layer, selection, wave)
    attend = functools.partial(staged_programs.attend, attention)
    zones, _ = jax.eval_shape(attend, layer, selection, wave)
    # As many rows as may be missed at most.
    block = jax.ShapeDtypeStruct((*missed.shape, 2, model.head_dim), DTYPE)
    of_missed = selection.query, zones, missed, slots, block
    last = params, layer, hidden, *of_missed, wave
    yield "finish", staged_programs.finish, (model, attention), last


def _kernels() -> Iterator[Any]:
    """Yield the two ops of a step alone, of stacks of two layers."""
    for head_dim, group, dtype in HEADS:
        shape = StepShape("", 2, 3, group, head_dim, 6000, 400, dtype)
        step = jax.eval_shape(functools.partial(make_step, shape, 0, layers=2))
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        name = f"{head_dim}-{group}-{dtype}"
        logits: Any = jax.ShapeDtypeStruct((*step.query.shape[:3], shape.cluster_room), jnp.float32)
        no_cache: Any = jax.ShapeDtypeStruct(
            (*step.store.shape[:3], 0, 2, head_dim), step.store.dtype
        )
        clusters = step.query, step.centroids, step.offsets, layer
        zones = (
            step.query,
            SteadyRows(step.sink, step.sink_tokens, step.window, step.window_tokens),
            StoredRows(Rows(step.store), Rows(no_cache)),
            Picks(step.tokens, step.slots, step.hit),
            Estimate(logits, step.value_means, step.offsets, step.remaining),
            layer,
        )
        for op, operands in ((ops.score_clusters, clusters), (ops.attend_zones, zones)):
            named: Any = functools.partial(op, scale=shape.scale, implementation="tpu")
            yield f"{op.__name__}-{name}", jax.jit(named), (), operands


if __name__ == "__main__":
    main()
