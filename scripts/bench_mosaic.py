"""Checks the Mosaic GPU kernels against the references on a GPU, and times them beside Triton's.

    python scripts/bench_mosaic.py --shapes batch8-128k,batch1-128k,batch1-1m --out mosaic.json

Each shape's variants are timed one after the other, Triton's first and last. Whatever fails is
printed with its traceback's end, and the rest goes on.
"""

import argparse
import functools
import json
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import copy_ceiling, device_facts, time_calls
from op_cases import Run, StepBench, by_api, names_from

from pallas_kernels.attend_dense import mosaic_gpu as attend_dense
from pallas_kernels.score_clusters import mosaic_gpu as score_clusters
from pallas_kernels.shapes import BENCHMARKED, SHAPES, StepShape
from pallas_kernels.types import MASKED
from wavejax.evaluation.files import write_growing

OPS = ("score_clusters", "attend_dense")
# Small shapes of other heads: their values are checked, and nothing is timed.
CHECKED = ("llama", "qwen", "smollm2", "gemma", "phi", "wide")
# How much a Mosaic kernel must win to be taken.
WIN = 1.03


# Of `attend_dense`: programs for each processor, tokens of a block, stages.
ATTEND_CUTS = ((3, 64, 2), (2, 64, 3), (1, 64, 6), (6, 64, 2), (1, 128, 3))
# Of `score_clusters`: clusters of a block, blocks of a program.
SCORE_CUTS = ((64, 1), (64, 2), (64, 3), (64, 4), (128, 1))


def variants(op: str, shape: StepShape) -> dict[str, Callable[..., Any]]:
    """Return the kernels to time, by name: Triton's as it is tuned, and Mosaic's by config."""
    triton = functools.partial(by_api("triton"), op)
    function: Callable[..., Any]
    configs: dict[str, Any]
    chosen: Any
    if op == "score_clusters":
        function = score_clusters.score_clusters
        configs = {f"{block} {n}": score_clusters.Config(block, n) for block, n in SCORE_CUTS}
        chosen = score_clusters.heuristic(shape.rows, shape.cluster_room, shape.head_dim)
    else:
        function = attend_dense.attend_dense
        configs = {
            f"{n} {block} {stages}": attend_dense.Config(
                max(1, 132 * n // shape.rows), block, stages
            )
            for n, block, stages in ATTEND_CUTS
        }
        chosen = attend_dense.heuristic(shape.rows, shape.tokens, shape.head_dim)
    others = {
        name: functools.partial(function, config=config)
        for name, config in configs.items()
        if config != chosen
    }
    return {"triton": triton, "heuristic": function, **others, "triton again": triton}


def kept(name: str) -> int:
    """Say how many lines of a traceback are worth printing."""
    return 12 if name == "heuristic" else 4


def attempt(label: str, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a variant; print what it found, or how it failed."""
    try:
        found = run()
    except NotImplementedError as error:
        found = {"error": str(error)}
        print(f"{label} {name}: not taken: {error}"[:400], flush=True)
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        lines = [line for line in lines if not line.startswith(("---", "For simplicity"))]
        lines = lines[-kept(name) :]
        found = {"error": "\n".join(line[:400] for line in lines)}
        print(f"FAILED {label} {name}\n{found['error']}", flush=True)
    else:
        print(f"{label} {name}: {found}"[:300], flush=True)
    return found


def errors(found: Any, expected: Any) -> dict[str, Any]:
    """Compare the first results that are not None: most absolute error, and the first place of it.

    A place is wrong too where one of the two is NaN or masked and the other is not.
    """
    worst: dict[str, Any] = {}
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        error = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, abs(one - other))
        error = np.nan_to_num(error, nan=np.inf)
        at = np.unravel_index(int(error.argmax()), error.shape)
        worst[f"error{i}"] = float(error[at])
        if error[at] > 1e-2:
            worst[f"wrong{i}"] = (
                f"{int((error > 1e-2).sum())} of {error.size}, NaN {int(np.isnan(one).sum())}, "
                f"masked {int((one <= MASKED / 2).sum())} for {int((other <= MASKED / 2).sum())}; "
                f"most at {tuple(map(int, at))}: {float(one[at])} for {float(other[at])}"
            )
    return worst


def runner(op: str, function: Callable[..., Any]) -> Run:
    """Make of one kernel what `StepBench.case` calls."""

    def run(name: str, *operands: Any, **settings: Any) -> Any:
        assert name == op
        return function(*operands, **settings)

    return run


def results_of(case: Any) -> list[Any]:
    """Return a case's results in its first layer."""
    return jax.tree.leaves(jax.jit(case.call)(jnp.int32(0), case.operands, case.state)[0])


def check_and_time(
    shape: str, op: str, names: list[str], timing: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check the variants at a shape, and time those that are right where it is to be timed.

    Yields:
        each variant's name and figures, as soon as they are there.
    """
    bench = StepBench(SHAPES[shape], by_api("triton"))
    expected = results_of(bench.case(op, by_api("xla")))
    for name, function in variants(op, bench.shape).items():
        if names and name not in names:
            continue

        def measure(function: Callable[..., Any] = function) -> dict[str, Any]:
            case = bench.case(op, runner(op, function))
            found = errors(results_of(case), expected)
            if timing is not None and not any(key.startswith("wrong") for key in found):
                own = {"links": case.links, **timing}
                took, _ = time_calls(case.call, case.operands, case.state, **own)
                found |= {"us": took.median * 1e6, "least_us": took.least * 1e6}
                found["gb_per_s"] = case.bytes / took.median / 1e9
            return found

        yield name, attempt(f"{shape} {op}", name, measure)


def table(report: dict[str, Any]) -> str:
    """Return the times: how many times faster than Triton each variant is, and who wins."""
    titles = f"{'shape':14}{'op':16}{'variant':16}{'us':>9}{'least':>9}{'GB/s':>7}{'x Triton':>10}"
    lines = [titles]
    for place, rows in report["timed"].items():
        shape, op = place.split()
        timed = {name: found["us"] for name, found in rows.items() if "us" in found}
        triton = min((us for name, us in timed.items() if "triton" in name), default=None)
        for name, found in rows.items():
            start = f"{shape:14}{op:16}{name:16}"
            if "us" not in found:
                lines.append(start + ("  failed" if "error" in found else "  wrong values"))
                continue
            ratio = triton / found["us"] if triton else 0.0
            verdict = "  wins" if ratio >= WIN and "triton" not in name else ""
            lines.append(
                f"{start}{found['us']:9.1f}{found['least_us']:9.1f}{found['gb_per_s']:7.0f}"
                f"{ratio:10.3f}{verdict}"
            )
    return "\n".join(lines)


def main() -> None:
    """Check small shapes, then check and time the others; print a table, write JSON as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(BENCHMARKED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--checked", default=",".join(CHECKED), help="shapes of checks alone")
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument("--variants", default="", help="only these, between commas: see the table")
    parser.add_argument("--seconds", type=float, default=0.15, help="of measurements, a variant")
    parser.add_argument("--ptxas", action="store_true", help="print registers and spills")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    args = parser.parse_args()
    if args.ptxas:
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    ops = names_from(parser, "--ops", args.ops, OPS)
    shapes = names_from(parser, "--shapes", args.shapes, SHAPES)
    checked = names_from(parser, "--checked", args.checked, SHAPES) if args.checked else []
    names = args.variants.split(",") if args.variants else []
    report: dict[str, Any] = device_facts() | {"checked": {}, "timed": {}}
    print(device_facts(), flush=True)
    report["copy"] = copy_ceiling(2.0 if jax.default_backend() == "gpu" else 0.01)
    print(f"copy {report['copy']}", flush=True)

    def save(whole: bool = False) -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_growing(args.out, json.dumps(report, indent=1), whole=whole)

    for shape in [*checked, *shapes]:
        timed = shape in shapes
        timing = {"seconds": args.seconds} if timed else None
        wanted = names if timed else ["heuristic"]
        for op in ops:
            rows: dict[str, Any] = {}
            report["timed" if timed else "checked"][f"{shape} {op}"] = rows
            tried = check_and_time(shape, op, wanted, timing)

            def fill(rows: dict[str, Any] = rows, tried: Any = tried) -> dict[str, Any]:
                for name, found in tried:
                    rows[name] = found
                    save()
                return {"variants": len(rows)}

            found = attempt(f"{shape} {op}", "all", fill)
            if "error" in found:  # of the reference: no variant was tried
                rows["all"] = found
                save()
    save(whole=True)
    print(table(report), flush=True)


if __name__ == "__main__":
    main()
