"""Times products of a few tokens with a layer's matrices, in bfloat16, 8 and 4 bits, on a GPU.

    python scripts/bench_products.py --out products.json

Each product is first compared with the one of the matrix's numbers in float64. Calls of a program
take matrices in turn that no cache holds together. A time is without what the chain of calls costs
itself. The floor is the time in which a copy moves the bytes of the matrix. Whatever fails is told,
and the rest goes on.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import copy_ceiling, device_facts, empty_chain, time_calls
from jax import Array, lax
from op_cases import names_from

from models.formats import INT4, INT8, WeightFormat
from models.layer import linear
from models.quantised import QuantisedMatrix
from pallas_kernels import use_implementation
from pallas_kernels.multiply_levels import triton
from wavejax.evaluation.files import write_growing

# Of a layer of Llama-3-8B, [out, in]: gate and up, down, query and output, key and value; and those
# that have the same inputs, joined.
MATRICES = {
    "qkv": (6144, 4096),
    "gate-up": (28672, 4096),
    "gate": (14336, 4096),
    "down": (4096, 14336),
    "query": (4096, 4096),
    "key": (1024, 4096),
}
FORMATS: dict[str, WeightFormat | None] = {
    "bfloat16": None,
    "int8": INT8,
    "int4": INT4,
    "Q4_0": WeightFormat(4, 32, "float16"),
    "Q4_K": WeightFormat(4, 32, "int8", block=256, minima=True),
    "Q6_K": WeightFormat(8, 16, "int8", block=256),
    "Q8_0": WeightFormat(8, 32, "float16"),
}
# Bytes of matrices that take turns: more than a GPU's cache holds.
TURNS = 200e6
CHECKED_ROWS = 256
# Of the root of a sum of squared products. Rounding each number and the result to bfloat16 gives
# up to 0.012 in the worst of the rows. A group of 32 columns that is left out of 14336: over 0.08.
TOLERANCE = 2.0**-5

Multiply = Callable[[Array, Any], Array]


def make_matrix(shape: tuple[int, int], format: WeightFormat | None, seed: int) -> Any:
    """Draw a matrix: of numbers, or of levels, scales and minima."""
    keys = iter(jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 8))
    if format is None:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) / 64

    def draw(name: str) -> Array:
        size, dtype = format.arrays(shape)[name]
        if name == "levels":
            return jax.random.bits(next(keys), size, jnp.uint8).view(dtype)
        if dtype == np.int8:
            return jax.random.randint(next(keys), size, 1, 64, jnp.int8)
        floats = jax.random.uniform(next(keys), size, jnp.float32, 1e-3, 2e-3)
        if name.startswith("minim"):
            floats = -8 * floats
        return floats.astype(dtype)

    arrays = {name: draw(name) for name in format.arrays(shape)}
    return QuantisedMatrix(**arrays, columns=shape[1], dtype=jnp.dtype(jnp.bfloat16))


def by_xla(inputs: Array, matrix: Any) -> Array:
    """Multiply as a model does without the kernel."""
    with use_implementation("xla"):
        return linear(inputs, matrix)


def by_kernel(config: triton.Config | None, inputs: Array, matrix: Any) -> Array:
    """Multiply by the kernel, in a config or in its own choice; splits of 0 are that one's."""
    if config is not None and config.splits == 0:
        out, row_bytes = matrix.levels.shape
        splits = triton.splits_of(out, row_bytes, config.rows, config.block)
        config = dataclasses.replace(config, splits=splits)
    return triton.multiply_levels(inputs, matrix.parts, config=config)


def error_of(multiply: Multiply, inputs: Array, matrix: Any) -> float:
    """Largest error of some rows, in parts of the root of the sum of their squared products."""
    out = matrix.shape[0]
    rows = np.random.default_rng(0).permutation(out)[:CHECKED_ROWS]
    picked = jax.tree.map(lambda x: x[jnp.asarray(rows)], matrix)
    floats = picked if isinstance(picked, Array) else picked.dequantise(jnp.float32)
    numbers, given = np.asarray(floats, np.float64), np.asarray(inputs, np.float64)
    found = np.asarray(jax.jit(multiply)(inputs, matrix), np.float64)[:, rows]
    # Of all tokens together, since one product alone may be near zero.
    sizes = np.square(given).sum(0) @ np.square(numbers).T
    errors = np.square(found - given @ numbers.T).sum(0)
    return float(np.sqrt((errors / sizes).max())) if np.isfinite(found).all() else math.inf


def bench(
    multiply: Multiply, inputs: Array, matrices: list[Any], seconds: float
) -> dict[str, float]:
    """One product's error, time and rate."""

    def call(link: Any, operands: Any, state: Any) -> tuple[Array, Any]:
        # Behind the barrier all of the product is made, not only what is read of it.
        return lax.optimization_barrier(multiply(*link)), state

    error = error_of(multiply, inputs, matrices[0])
    if error > TOLERANCE:
        raise AssertionError(f"the product is wrong: {error:.2e} of the products' root mean square")
    links = tuple((inputs * (1 + i), matrix) for i, matrix in enumerate(matrices))
    took, _ = time_calls(call, (), links=links, calls=max(20, len(links)), seconds=seconds)
    return {"us": took.median * 1e6, "least_us": took.least * 1e6, "error": error}


def ways(name: str, format: WeightFormat | None, sweep: bool) -> dict[str, Multiply]:
    """Ways to multiply by a format: XLA's, the kernel's own choice, and configs of it."""
    found: dict[str, Multiply] = {"XLA": by_xla}
    if format is None or format.group is None:
        return found
    found["kernel"] = functools.partial(by_kernel, None)
    if sweep:
        for config in configs(name):
            sizes = (config.rows, config.block, config.splits, config.num_warps, config.num_stages)
            label = "/".join(map(str, sizes)) + ("p" if config.pairs else "")
            found[label] = functools.partial(by_kernel, config)
    return found


def configs(name: str) -> list[triton.Config]:
    """Configs that are worth a try; splits of 0 are the heuristic's."""
    base = triton.Config(splits=0, pairs=name in ("int4", "Q4_K"))
    tried: list[dict[str, Any]] = [
        {},
        {"splits": 1},
        {"splits": 4},
        {"splits": 8},
        {"rows": 32},
        {"rows": 128},
        {"rows": 128, "block": 64},
        {"rows": 128, "block": 64, "num_warps": 4},
        {"rows": 256, "block": 64, "num_warps": 4},
        {"block": 64},
        {"block": 256, "num_stages": 3},
        {"num_stages": 3},
        {"num_stages": 5},
        {"num_warps": 4},
        {"pairs": False},
        {"pairs": False, "rows": 32},
        {"pairs": False, "num_warps": 4},
    ]
    found = [dataclasses.replace(base, **x) for x in tried]
    return list(dict.fromkeys(found))


def row_of(found: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{found['matrix']:8}{found['tokens']:4}  {found['format']:9}{found['way']:18}"
    if "error_text" in found:
        return f"{head}  {found['error_text']}"
    return (
        f"{head}{found['us']:9.2f}{found['gb_per_s']:8.0f}{found['share']:7.0%}"
        f"{found['error']:10.1e}"
    )


def numbers_of(text: str) -> list[int]:
    """Return the numbers between commas; raise ValueError."""
    return [int(part) for part in text.split(",")]


class Run:
    """One run of the script: its options, what it found, and how much time is left."""

    def __init__(self, options: argparse.Namespace):
        """Measure what all products are compared with."""
        self.options, self.left_out = options, 0
        self.start = time.perf_counter()
        on_gpu = jax.default_backend() == "gpu"
        self.copy = copy_ceiling(2.0 if on_gpu else 0.01)
        self.empty_us = empty_chain(20).median * 1e6
        self.products: list[dict[str, Any]] = []
        self.report: dict[str, Any] = device_facts() | {"copy": self.copy}
        self.report |= {"empty_call_us": self.empty_us, "products": self.products}

    def keep(self, whole: bool = False) -> None:
        """Write all that was found until now."""
        out = self.options.out
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_growing(out, json.dumps(self.report, indent=1), whole=whole)

    def add(self, found: dict[str, Any], error: Exception | None = None) -> None:
        """Keep and print what was found, or how it failed."""
        if error is not None:
            lines = f"{type(error).__name__}: {error}".splitlines()
            found["error_text"] = " | ".join(lines[-3:])[:600]
        self.products.append(found)
        print(row_of(found), flush=True)

    def time_format(self, name: str, kind: str) -> None:
        """Time all products with one matrix in one format."""
        options, shape, format = self.options, MATRICES[name], FORMATS[kind]
        try:
            matrices = [make_matrix(shape, format, 0)]
            count = max(2, math.ceil(options.turns / matrices[0].nbytes))
            matrices += [make_matrix(shape, format, seed) for seed in range(1, count)]
            jax.block_until_ready(matrices)
        except Exception as error:
            self.add({"matrix": name, "tokens": 0, "format": kind, "way": "matrices"}, error)
            return
        size = matrices[0].nbytes
        for tokens in options.tokens:
            inputs = jax.random.normal(jax.random.key(tokens), (tokens, shape[1]), jnp.bfloat16)
            for way, multiply in ways(kind, format, options.sweep).items():
                if options.only_kernel and way == "XLA":
                    continue
                if time.perf_counter() - self.start > options.budget:
                    self.left_out += 1
                    continue
                head = {"matrix": name, "tokens": tokens, "format": kind, "way": way, "bytes": size}
                try:
                    self.add(head | self.product(multiply, inputs, matrices, size))
                except Exception as error:  # The others are still worth measuring.
                    self.add(head, error)

    def product(
        self, multiply: Multiply, inputs: Array, matrices: list[Any], size: int
    ) -> dict[str, float]:
        """Return one product's error, and its times without the chain's own."""
        found = bench(multiply, inputs, matrices, self.options.seconds)
        found |= {key: found[key] - self.empty_us for key in ("us", "least_us")}
        found["gb_per_s"] = size / found["us"] / 1e3
        return found | {"share": 1e9 * found["gb_per_s"] / self.copy["best"]}


def main() -> None:
    """Time all, print a table, and write the JSON after each format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrices", default=",".join(MATRICES), help=f"of {', '.join(MATRICES)}")
    parser.add_argument(
        "--formats", default="bfloat16,int8,int4,Q4_K", help=f"of {', '.join(FORMATS)}"
    )
    parser.add_argument("--tokens", type=numbers_of, default="1,2,4,8,16,32")
    parser.add_argument("--sweep", action="store_true", help="configs of the kernel too")
    parser.add_argument("--only-kernel", action="store_true", help="leave XLA's ways out")
    parser.add_argument("--seconds", type=float, default=0.05, help="of measurements, a product")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds; later ones are left out"
    )
    parser.add_argument("--turns", type=float, default=TURNS, help="bytes of matrices in turn")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    options = parser.parse_args()
    names = names_from(parser, "--matrices", options.matrices, MATRICES)
    kinds = names_from(parser, "--formats", options.formats, FORMATS)

    run = Run(options)
    ceiling = run.copy["best"] / 1e9
    print(f"{run.report['device']}, copy {ceiling:.0f} GB/s, empty call {run.empty_us:.2f} us")
    print("matrix   tok  format   way                      us    GB/s  floor     error", flush=True)
    for name in names:
        for kind in kinds:
            run.time_format(name, kind)
            run.keep()
    print(f"{time.perf_counter() - run.start:.0f} s, {run.left_out} left out", flush=True)
    run.keep(whole=True)


if __name__ == "__main__":
    main()
