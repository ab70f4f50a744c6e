"""Times `attend_zones` in plain JAX beside full attention: a short context, all of it retrieved.

    JAX_PLATFORMS=cpu python scripts/bench_plain_zones.py --tokens 4096

The two take turns, so that whatever else the machine does is done to both. Prints milliseconds of
one layer, the least and the median of all turns, as JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as ops
from pallas_kernels.shapes import StepShape
from pallas_kernels.testing import make_step
from pallas_kernels.types import Estimate, Picks, Rows, SteadyRows, StoredRows


def main() -> None:
    """Time both, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3, help="query heads of a kv head")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    shape = StepShape(
        *("", 1, args.kv_heads, args.group, args.head_dim, args.tokens, args.tokens // 32),
        dtype=args.dtype,
        retrieved_fraction=1.0,
    )
    cases = _cases(shape)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(args.repeats + 1):
        for name, (program, operands) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands, jnp.int32(turn % 2)))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        least, median = (round(1e3 * x, 3) for x in (min(taken), statistics.median(taken)))
        print(json.dumps({"op": name, "ms": least, "median_ms": median}))


def _cases(shape: StepShape) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Make both ops, and their operands but for the layer; all rows are read from the store."""
    x = make_step(shape, 0, layers=2, miss_share=1.0)
    scores = ops.score_clusters(x.query, x.centroids, x.offsets, 0, scale=shape.scale)
    no_cache = Rows(jnp.copy(x.cache_rows[:, :, :, :0]))
    none = jnp.full_like(x.slots, ops.NO_ID)
    zones = (
        x.query,
        SteadyRows(x.sink, x.sink_tokens, x.window, x.window_tokens),
        StoredRows(Rows(x.store), no_cache),
        Picks(x.tokens, none, jnp.zeros_like(x.hit)),
        Estimate(scores.logits, x.value_means, x.offsets, x.remaining),
    )
    lengths = jnp.full(shape.batch, shape.tokens, jnp.int32)
    dense = x.query, *(Rows(jnp.copy(x.store[..., i, :])) for i in (0, 1)), lengths
    settings: Any = {"scale": shape.scale, "implementation": "xla"}
    return {
        "attend_zones": (jax.jit(functools.partial(ops.attend_zones, **settings)), zones),
        "attend_dense": (jax.jit(functools.partial(ops.attend_dense, **settings)), dense),
    }


if __name__ == "__main__":
    main()
