"""Times a kernel that reads scattered rows of pinned host memory in place.

    python scripts/bench_host_reads.py

What limits such reads is not bytes alone. It matters over how much memory the rows are scattered,
how many of them lie near each other, in which order they are read, and how many are asked for at
once: host addresses are translated, and what remembers translations covers only so much memory.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.toolbox import launch
from wavejax.evaluation.files import append_lines

ROW = 256  # bfloat16 numbers: a token's key and value at head dim 128
READS = 8  # in one program, each of other rows
LISTS, SEGMENT = 64, 8192  # heads of all sequences, and rows of a segment of the index


def _kernel(rows_ref: Any, numbers_ref: Any, sums_ref: Any) -> None:
    program, tiles, tile = pl.program_id(0), numbers_ref.shape[0], numbers_ref.shape[2]
    column = jnp.arange(ROW)[None, :]

    # A while loop: Triton would read ahead in a for loop by cp.async, which host memory dislikes.
    def add(state: tuple[Any, Any]) -> tuple[Any, Any]:
        i, total = state
        at = plt.load(numbers_ref.at[i, program, jnp.arange(tile)])
        rows = plt.load(rows_ref.at[at[:, None], column])
        return i + 1, total + jnp.sum(rows.astype(jnp.float32))

    _, total = lax.while_loop(lambda state: state[0] < tiles, add, (jnp.int32(0), jnp.float32(0)))
    plt.store(sums_ref.at[program], total)


@jax.jit
def read(rows: Array, numbers: list[Array]) -> list[Array]:
    """Return sums of the rows of these numbers, a kernel for each array of them.

    Args:
        rows: `[rows, ROW]`, maybe in host memory.
        numbers: `[tiles, programs, tile]` int32 each: a program reads `tile` rows at a time, and
            all programs take the tiles in turn.
    """
    return [
        launch.call(
            _kernel,
            (rows, each),
            jax.ShapeDtypeStruct(each.shape[1:2], jnp.float32),
            each.shape[1:2],
            name="read_rows",
            num_warps=4 if each.shape[2] >= 16 else 1,
            num_stages=1,
        )
        for each in numbers
    ]


def draw(
    rng: np.random.Generator,
    count: int,
    shape: tuple[int, int, int],
    together: int,
    within: int,
    order: str,
) -> np.ndarray:
    """Numbers of rows out of so many, some near each other: `[tiles, programs, tile]`.

    Args:
        rng: draws them.
        count: rows that there are.
        shape: the result's.
        together: rows of one window.
        within: a window's rows; as many as `together`: those lie side by side.
        order: "random"; "rising", so that all programs read close together at any time; or "lists",
            by rising segments in each of `LISTS` regions that all are read at once, as a decode
            step reads what its heads miss.
    """
    tiles, programs, tile = shape
    wanted = tiles * programs * tile // together

    def fill(windows: np.ndarray) -> np.ndarray:
        """Return the rows read of each window: one of each of as many equal parts of it."""
        parts = np.arange(together) * within // together
        somewhere = rng.integers(0, within // together, (*windows.shape, together))
        return windows[..., None] * within + parts + somewhere

    if order == "lists":
        region, each = count // LISTS // within, wanted // LISTS
        first = np.stack([rng.permutation(region)[:each] + i * region for i in range(LISTS)])
        by_segment = np.argsort(first // max(SEGMENT // within, 1), axis=1, kind="stable")
        numbers = fill(np.take_along_axis(first, by_segment, axis=1))
        return numbers.reshape(LISTS, tiles, -1, tile).transpose(1, 2, 0, 3).reshape(shape)
    first = rng.permutation(count // within)[:wanted]
    if order == "rising":
        first.sort()
    return fill(first).reshape(shape)


def main() -> None:
    """Print the rate for every combination of what the options list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", default="0.5,1,2,4.3")
    parser.add_argument("--together", default="1,2,4,8", help="rows of one window")
    parser.add_argument("--within", default="1", help="rows of a window, or as many as --together")
    parser.add_argument("--orders", default="random,rising,lists")
    parser.add_argument("--programs", default="256", help="that read at once")
    parser.add_argument("--tiles", default="32", help="rows that a program asks for at once")
    parser.add_argument("--rows", type=int, default=19_000, help="read in a kernel")
    parser.add_argument("--out", type=Path, help="write the rates here, as JSON lines")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"there is no GPU to read with: JAX runs on {jax.default_backend()}")
    rng = np.random.default_rng(0)
    numbers = (arguments.together, arguments.within, arguments.programs, arguments.tiles)
    kinds = list(
        itertools.product(
            *([int(n) for n in each.split(",")] for each in numbers), arguments.orders.split(",")
        )
    )
    for gigabytes in map(float, arguments.gigabytes.split(",")):
        count = int(gigabytes * 1e9) // (2 * ROW)
        rows = jnp.ones((count, ROW), jnp.bfloat16)
        rows = jax.block_until_ready(jax.device_put(rows, jax.memory.Space.Host))
        for together, window, programs, tile, order in kinds:
            within = max(window, together)
            tiles = -(-arguments.rows // (programs * tile))
            wanted = tiles * programs * tile
            seconds = []
            for _ in range(4):
                shape = tiles, programs, tile
                drawn = [draw(rng, count, shape, together, within, order) for _ in range(READS)]
                drawn = jax.block_until_ready([jnp.asarray(x, jnp.int32) for x in drawn])
                start = time.perf_counter()
                jax.block_until_ready(read(rows, drawn))
                seconds.append(time.perf_counter() - start)
            rate = READS * wanted * 2 * ROW / min(seconds[1:]) / 1e9
            kind = {"gigabytes": gigabytes, "together": together, "within": within}
            kind |= {"programs": programs, "tile": tile, "order": order, "gb_per_s": round(rate, 1)}
            print(kind, flush=True)
            if arguments.out:
                append_lines(arguments.out, [json.dumps(kind)])
        del rows


if __name__ == "__main__":
    main()
