"""Times `append_rows` into a row store in pinned host memory: XLA, the kernel, and a plain copy.

    python scripts/bench_host_writes.py --out host_writes.json

Rows of one layer at Llama-3-8B's heads (8 kv heads, head dim 128, bfloat16): a prompt's, and those
that an index grows by. The kernel at several lengths of a program's run, of what it copies at once,
and numbers of warps; the first line of a size is what it picks by itself.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import device_facts
from jax import Array

from pallas_kernels.append_rows import reference, triton
from pallas_kernels.types import Rows
from wavejax.evaluation.files import write_growing

HEADS, HEAD_DIM, DTYPE = 8, 128, jnp.bfloat16
ROW_BYTES = 2 * HEAD_DIM * jnp.dtype(DTYPE).itemsize


def seconds_of(run: Any, state: Any, calls: int, repeats: int = 3) -> tuple[float, Any]:
    """Least seconds a call of `state = run(state)`, of so many calls queued at once; the state."""
    for _ in range(2):  # The second call with a donated operand may compile once more.
        state = jax.block_until_ready(run(state))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            state = run(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls)
    return min(times), state


def appended(program: Any, rows: Array, at: tuple[Array, ...], store: Array) -> Array:
    """Return the store with the rows in it."""
    written: Array = program(Rows(store), rows, *at).data
    return written


def kinds_of(new: int, arguments: argparse.Namespace) -> list[tuple[dict[str, Any], Any]]:
    """Return what to time: what it is, and the function."""

    def kernel(config: triton.Config) -> tuple[dict[str, Any], Any]:
        programs = -(-new // config.tokens) * HEADS
        named = {"run_kib": config.tokens * ROW_BYTES // 1024, "tile": config.tile}
        facts = {"what": "kernel", **named, "warps": config.num_warps, "programs": programs}
        return facts, functools.partial(triton.append_rows, config=config)

    itemsize = jnp.dtype(DTYPE).itemsize
    found = [kernel(triton.heuristic(HEADS, new, HEAD_DIM, itemsize))]
    numbers = (arguments.run_kib, arguments.tiles, arguments.warps)
    for run, tile, warps in itertools.product(*([int(n) for n in x.split(",")] for x in numbers)):
        tokens = max(run * 1024 // ROW_BYTES, 1)
        if tokens <= new:
            found.append(kernel(triton.Config(tokens, tile, warps)))
    return [*found, ({"what": "xla"}, reference.append_rows)]


def main() -> None:
    """Print the rate of each way to write, for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072, help="room for rows, of a head")
    parser.add_argument("--layers", type=int, default=16, help="of the store: 16 are 4.3 GB")
    parser.add_argument("--rows", default="131072,1024", help="to append, of a head")
    parser.add_argument("--run-kib", default="32,128,512", help="that one program writes")
    parser.add_argument("--tiles", default="2048,4096,8192", help="numbers copied at once")
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"there is no GPU to write from: JAX runs on {jax.default_backend()}")
    report: dict[str, Any] = device_facts() | {"rates": []}
    print(report, flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    shape = (arguments.layers, 1, HEADS, arguments.tokens, 2, HEAD_DIM)
    store = jax.device_put(np.zeros(shape, DTYPE), jax.memory.Space.Host)
    report["store_bytes"] = store.nbytes
    layer, first = jnp.int32(arguments.layers - 1), jnp.int32(0)
    for new in map(int, arguments.rows.split(",")):
        rows = jax.random.normal(jax.random.key(0), (HEADS, new, 2, HEAD_DIM), DTYPE)
        start = jnp.int32(arguments.tokens - new)
        calls = 5 if rows.nbytes > 1e8 else 50

        def note(facts: dict[str, Any], took: float, new: int = new, rows: Any = rows) -> None:
            rate = {"gb_per_s": round(rows.nbytes / took / 1e9, 2), "us": round(took * 1e6, 1)}
            report["rates"].append({"rows": new, **facts, **rate})
            print(report["rates"][-1], flush=True)
            if arguments.out:
                write_growing(arguments.out, json.dumps(report, indent=1), whole=False)

        copy = functools.partial(jax.device_put, rows, jax.memory.Space.Host)
        note({"what": "device_put"}, seconds_of(lambda _, copy=copy: copy(), None, calls)[0])
        for facts, append in kinds_of(new, arguments):
            program = jax.jit(append, donate_argnums=0)
            run = functools.partial(appended, program, rows, (layer, first, start))
            took, store = seconds_of(run, store, 2 if facts["what"] == "xla" else calls)
            note(facts, took)
    if arguments.out:
        write_growing(arguments.out, json.dumps(report, indent=1), whole=True)


if __name__ == "__main__":
    main()
