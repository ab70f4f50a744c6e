"""Times a kernel that reads scattered rows of pinned host memory in place.

    python scripts/bench_host_reads.py

What limits such reads is not bytes alone: it matters over how much memory the rows are scattered
and how many of them lie side by side.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas

ROW = 256  # bfloat16 numbers: a token's key and value at head dim 128
PROGRAMS, TILES, TILE = 264, 16, 32


def _kernel(rows_ref: Any, numbers_ref: Any, sums_ref: Any) -> None:
    program = pl.program_id(0)
    column = jnp.arange(ROW)[None, :]

    # A while loop: Triton would read ahead in a for loop by cp.async, which host memory dislikes.
    def add(state: tuple[Any, Any]) -> tuple[Any, Any]:
        left, total = state
        at = plt.load(numbers_ref.at[program, left - 1, jnp.arange(TILE)])
        rows = plt.load(rows_ref.at[at[:, None], column])
        return left - 1, total + jnp.sum(rows.astype(jnp.float32))

    start = jnp.int32(TILES), jnp.float32(0)
    _, total = lax.while_loop(lambda state: state[0] > 0, add, start)
    plt.store(sums_ref.at[program], total)


def read(rows: Array, numbers: Array) -> Array:
    """Sums of the rows of these numbers, `[programs]`; rows may lie in host memory."""
    return _pallas.call(
        _kernel,
        (rows, numbers),
        jax.ShapeDtypeStruct((PROGRAMS,), jnp.float32),
        (PROGRAMS,),
        name="read_rows",
        num_warps=4,
        num_stages=1,
    )


def main() -> None:
    """Prints the rate at several sizes of memory and numbers of neighbouring rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", default="0.5,1,2,4")
    parser.add_argument("--neighbours", default="1,2,4,8")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"there is no GPU to read with: JAX runs on {jax.default_backend()}")
    wanted = PROGRAMS * TILES * TILE
    rng = np.random.default_rng(0)
    program = jax.jit(read)
    for gigabytes in map(float, arguments.gigabytes.split(",")):
        count = int(gigabytes * 1e9) // (2 * ROW)
        make = functools.partial(jnp.ones, (count, ROW), jnp.bfloat16)
        rows = jax.block_until_ready(jax.device_put(jax.jit(make)(), jax.memory.Space.Host))
        for together in map(int, arguments.neighbours.split(",")):
            seconds = []
            for _ in range(6):
                # Other rows each time: the GPU keeps some of what it has read.
                first = rng.permutation(count // together)[: wanted // together, None] * together
                numbers = jnp.asarray((first + np.arange(together)).reshape(-1), jnp.int32)
                numbers = jax.block_until_ready(numbers.reshape(PROGRAMS, TILES, TILE))
                start = time.perf_counter()
                jax.block_until_ready(program(rows, numbers))
                seconds.append(time.perf_counter() - start)
            rate = wanted * 2 * ROW / min(seconds[2:]) / 1e9
            print(f"{gigabytes:4} GB, {together} rows side by side: {rate:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
