"""Times every op of a decode step at real shapes, beside a copy and full attention.

    python scripts/bench_kernels.py --shapes batch8-128k,batch1-128k,batch1-1m --out results.json

All figures of a table come from one run. Whatever fails is reported and the rest goes on.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from full_attention import time_full_attention
from gpu_timing import copy_ceiling, device_facts, empty_chain, time_calls, time_program
from jax import Array
from moment_cases import MOMENT_OPS, case_of
from op_cases import OTHER_OPS, STEP_OPS, OpCase, Run, StepBench, by_api, names_from
from step_case import STEPS, step_case

from pallas_kernels.encode_tokens import rotation
from pallas_kernels.shapes import BENCHMARKED, SHAPES, StepShape
from pallas_kernels.testing import make_step, with_misses
from wavejax.evaluation.files import write_growing

SECTIONS = (*STEP_OPS, *STEPS, "full_attention", "misses", "build")
MISS_SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
MISS_LISTS = 10  # of rows to read, which the calls of a program take in turn

# What each figure must reach and what it aims at. Rates count as shares of the copy ceiling.
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "score_clusters": {"share": (0.65, 0.85)},
    "select_clusters": {"us": (20, 12)},
    "score_tokens": {"us": (50, 20)},
    "select_tokens": {"us": (60, 30)},
    "attend_zones": {"share": (0.55, 0.80)},
    "misses": {"gb_per_s": (42, 47)},
    "build": {"ms": (8, 4)},
}
STEP_TARGETS = {
    "batch8-128k": (5.0, 9.0),
    "batch1-128k": (2.5, 5.0),
    "batch1-1m": (6.0, 12.0),
}
# The figures but for the step's are for this shape.
TARGET_SHAPE = "batch8-128k"


def bench_case(case: OpCase, ceiling: float, **timing: Any) -> dict[str, float]:
    """Return an op's time, and its rate by the bytes that it must move."""
    took, _ = time_calls(case.call, case.operands, case.state, links=case.links, **timing)
    rate = case.bytes / took.median
    return {
        "us": took.median * 1e6,
        "least_us": took.least * 1e6,
        "most_us": took.most * 1e6,
        "bytes": case.bytes,
        "gb_per_s": rate / 1e9,
        "share": rate / ceiling if ceiling else 0.0,
    }


def bench_op(bench: StepBench, op: str, ceiling: float, timing: dict[str, Any]) -> dict[str, float]:
    """One op's figures; its inputs, made by the ops before it, are not in them."""
    return bench_case(case_of(bench, op), ceiling, **timing)


def bench_step(
    bench: StepBench, pooled: bool, ceiling: float, timing: dict[str, Any]
) -> dict[str, float]:
    """All ops' figures in one program."""
    return bench_case(step_case(bench, pooled=pooled), ceiling, **timing)


def bench_full_attention(shape: StepShape) -> dict[str, Any]:
    """Full attention over as many tokens: the best of the baselines."""

    @jax.jit
    def make() -> tuple[Array, Array, Array]:
        x = make_step(shape, 1)
        return x.query, x.store[0, ..., 0, :], x.store[0, ..., 1, :]

    query, keys, values = make()
    found = time_full_attention(query, keys, values, shape.scale)
    moved = keys.nbytes + values.nbytes
    if found["best"] is not None:
        seconds = found["seconds"][found["best"]]
        found |= {"us": seconds * 1e6, "gb_per_s": moved / seconds / 1e9}
    return found | {"bytes": moved}


def bench_misses(shape: StepShape, run: Run, timing: dict[str, Any]) -> dict[str, Any]:
    """`attend_zones` with a store in pinned host memory, at several shares of misses.

    Each call of a program asks for other rows than the call before: by the same ones it would be
    measured how fast rows come that were read a moment ago.
    """
    bench = StepBench(shape, run, layers=1)
    inputs = bench.inputs
    host = jax.block_until_ready(jax.device_put(inputs.store, jax.memory.Space.Host))
    # The store stays out of the program that draws the lists.
    inputs = inputs._replace(store=jnp.zeros((0,), inputs.store.dtype))
    bench.inputs = inputs._replace(store=host)
    case = bench.case("attend_zones")

    def call(lists: tuple[Array, ...], operands: Any, state: Array) -> tuple[Any, Array]:
        before, after = operands
        return case.call(jnp.int32(0), (before, (*lists, *after)), state)

    before, after = case.operands
    row = 2 * shape.head_dim * host.dtype.itemsize
    points: dict[str, Any] = {}
    for share in MISS_SHARES:
        drawn = [with_misses(inputs, shape, 7 + i, jnp.float32(share)) for i in range(MISS_LISTS)]
        rows = sum(int(jnp.sum((x.tokens < shape.tokens) & ~x.hit)) for x in drawn)
        missed = row * rows / len(drawn)
        links = tuple((x.tokens, x.slots, x.hit) for x in drawn)
        state = jnp.copy(inputs.cache_rows)
        took, _ = time_calls(call, (before, after[3:]), state, links=links, **timing)
        points[f"{share:.2f}"] = {
            "us": took.median * 1e6,
            "missed_bytes": missed,
            "gb_per_s": missed / took.median / 1e9,
        }
    return {"points": points, **points["0.25"]}


def bench_build(shape: StepShape, run: Run) -> dict[str, float]:
    """Clusters and codes of one sequence of the shape's tokens, in all its heads."""
    size = min(shape.segment_tokens, shape.tokens)
    rows = shape.kv_heads * (shape.tokens // size)
    key = jax.random.key(0, impl="unsafe_rbg")
    keys, values = (
        jax.random.normal(k, (rows, size, shape.head_dim), jnp.dtype(shape.dtype))
        for k in jax.random.split(key)
    )
    build = functools.partial(
        run, "build_clusters", cluster_size=32, max_cluster_size=64, iterations=10
    )
    matrix = jnp.asarray(rotation(shape.head_dim))

    @jax.jit
    def clusters_only(keys: Array, values: Array) -> Any:
        return build(keys, values, jnp.int32(size))

    @jax.jit
    def both(keys: Array, values: Array) -> Any:
        clusters = build(keys, values, jnp.int32(size))
        centroids = clusters.centroids.astype(keys.dtype)
        position = jnp.arange(size)
        own = jax.vmap(lambda o: jnp.searchsorted(o, position, side="right") - 1)(clusters.offsets)
        own = jnp.minimum(own, centroids.shape[1] - 1)[..., None]
        ordered = jnp.take_along_axis(keys, clusters.order[..., None], axis=1)
        coded = run("encode_tokens", ordered, jnp.take_along_axis(centroids, own, axis=1), matrix)
        return clusters, coded

    few = {"runs": 3, "queued": 2}
    return {
        "ms": 1e3 * time_program(both, (keys, values), **few),
        "clusters_ms": 1e3 * time_program(clusters_only, (keys, values), **few),
    }


def record_attempt(
    results: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]
) -> None:
    """Record what `measure` finds, or how it fails."""
    start = time.perf_counter()
    try:
        results[name] = measure()
    except Exception as error:  # The other sections are still worth measuring.
        results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    results[name]["section_s"] = time.perf_counter() - start
    shown = {k: v for k, v in results[name].items() if k in ("us", "ms", "gb_per_s", "error")}
    print(f"  {name}: {shown}"[:400], flush=True)


def bench_shape(
    shape: StepShape,
    run: Run,
    sections: list[str],
    ceiling: float,
    timing: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """All of the sections at one shape; `save` is called with those that are done, after each."""
    results: dict[str, Any] = {}

    def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        record_attempt(results, name, measure)
        save(results)

    if "full_attention" in sections:
        attempt("full_attention", lambda: bench_full_attention(shape))
    picked = [op for op in (*STEP_OPS, *OTHER_OPS, *MOMENT_OPS) if op in sections]
    steps = [name for name in STEPS if name in sections]
    if picked or steps:
        bench = StepBench(shape, run)
        for op in picked:
            attempt(op, functools.partial(bench_op, bench, op, ceiling, timing))
        for name in steps:
            pooled = name == "step-pooled"
            attempt(name, functools.partial(bench_step, bench, pooled, ceiling, timing))
        del bench
    # The extras are for one shape: a host store takes seconds to make.
    if "misses" in sections and shape.name in (TARGET_SHAPE, "tiny"):
        attempt("misses", lambda: bench_misses(shape, run, timing))
    if "build" in sections and shape.name in (TARGET_SHAPE, "tiny"):
        attempt("build", lambda: bench_build(shape, run))
    full = results.get("full_attention", {}).get("us")
    for section in (*STEP_OPS, "step"):
        if full and "us" in results.get(section, {}):
            results[section]["full_attention_ratio"] = full / results[section]["us"]
    save(results)


def verdict(value: float, must: float, aim: float) -> str:
    """How a figure stands to its targets; it is to be the less of them if `aim` is less."""
    sign = 1 if aim >= must else -1
    return "aim" if sign * value >= sign * aim else "must" if sign * value >= sign * must else "NO"


def tables(shapes: dict[str, dict[str, Any]]) -> str:
    """Return the figures, and which targets they meet."""
    lines = [f"{'shape':8}{'op':26}{'us':>10}{'GB/s':>8}{'ceiling':>9}{'vs full':>9}"]
    marks = []
    for shape, results in shapes.items():
        for op, found in results.items():
            us = found.get("us", 1e3 * found["ms"] if "ms" in found else None)
            if us is None:
                lines.append(f"{shape:8}{op:26}  {str(found.get('error', found))[:70]}")
                continue
            share, ratio = found.get("share"), found.get("full_attention_ratio")
            lines.append(
                f"{shape:8}{op:26}{us:10.1f}{found.get('gb_per_s', 0):8.0f}"
                + (f"{share:9.0%}" if share else " " * 9)
                + (f"{ratio:8.2f}x" if ratio else "")
            )
            targets = dict(TARGETS.get(op, {})) if shape == TARGET_SHAPE else {}
            if op == "step" and shape in STEP_TARGETS:
                targets["full_attention_ratio"] = STEP_TARGETS[shape]
            for name, (must, aim) in targets.items():
                if name in found:
                    value = found[name]
                    mark = verdict(value, must, aim)
                    marks.append(
                        f"{shape:8}{op:26}{name:22}{value:9.2f}  must {must:g} aim {aim:g}: {mark}"
                    )
    return "\n".join([*lines, "", "targets met ('NO': not even what it must):", *marks])


def main() -> None:
    """Measures, writes the JSON after every section, and prints the tables.

    Until all are done, the JSON is `NAME.unfinished.json`.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(BENCHMARKED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ops", default=",".join(SECTIONS), help="sections to run")
    parser.add_argument("--implementation", choices=["triton", "xla"], default="triton")
    parser.add_argument("--seconds", type=float, default=0.25, help="of measurements, an op")
    parser.add_argument("--calls", type=int, default=20, help="calls in one program")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    arguments = parser.parse_args()
    sections = names_from(parser, "--ops", arguments.ops, (*SECTIONS, *OTHER_OPS, *MOMENT_OPS))
    shapes = names_from(parser, "--shapes", arguments.shapes, SHAPES)

    gpu = jax.default_backend() == "gpu"
    timing = {"seconds": arguments.seconds, "calls": arguments.calls}
    report: dict[str, Any] = device_facts() | {"implementation": arguments.implementation}
    print(report, flush=True)
    report["copy"] = copy_ceiling(2.0 if gpu else 0.01)
    report["empty_call_us"] = empty_chain(arguments.calls).median * 1e6
    print(f"copy {report['copy']}, empty call {report['empty_call_us']:.2f} us", flush=True)
    report["shapes"] = {}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def save(name: str, results: dict[str, Any], whole: bool = False) -> None:
        report["shapes"][name] = results
        if arguments.out:
            write_growing(arguments.out, json.dumps(report, indent=1), whole=whole)

    for name in shapes:
        print(name, flush=True)
        run = by_api(arguments.implementation)
        bench_shape(
            *(SHAPES[name], run, sections, report["copy"]["best"], timing),
            functools.partial(save, name),
        )
    save(name, report["shapes"][name], whole=True)
    print(tables(report["shapes"]))


if __name__ == "__main__":
    main()
