"""Tunes the ops' kernels on this GPU and writes what it finds into the table of configs.

    python scripts/tune_kernels.py --shapes batch8-128k,batch1-128k,batch1-1m --budget-seconds 400

From the heuristic's config it changes one field at a time and keeps what is faster and gives the
same result. Every op and shape is written as soon as it is done, and skipped in a later run.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import time_calls
from op_cases import OTHER_OPS, STEP_OPS, Run, StepBench, by_api, names_from

from pallas_kernels import tuning
from pallas_kernels.shapes import BENCHMARKED, SHAPES
from wavejax.evaluation.files import write_text

# A change must gain so much to count: timings differ by that from run to run.
GAIN = 0.015
# A kernel that rounds or adds in another order is as right.
TOLERANCE = 1e-2


def neighbours(config: Any) -> list[Any]:
    """Return the configs that differ from this one in one field, by one step."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        changed: list[Any] = []
        if isinstance(value, bool):
            changed = [not value]
        elif isinstance(value, int):
            if field.name.endswith("stages"):
                changed = [value - 1, value + 1]
            else:
                changed = [value // 2, value * 2]
            most = {"warps": 16, "stages": 5}.get(field.name.rsplit("_", 1)[-1], 8192)
            changed = [v for v in changed if 1 <= v <= most]
        found += [dataclasses.replace(config, **{field.name: v}) for v in changed]
    return found


def with_config(op: str, config: Any, rest: Run) -> Run:
    """Run `op` by its kernel with this config, and every other op by `rest`."""
    function = getattr(importlib.import_module(f"pallas_kernels.{op}.triton"), op)

    def run(name: str, *operands: Any, **keywords: Any) -> Any:
        if name != op:
            return rest(name, *operands, **keywords)
        return function(*operands, **keywords, config=config)

    return run


def heuristic_of(op: str, bench: StepBench) -> tuple[Any, str] | None:
    """Return the config that the op takes for a shape, and the shape's key in the table."""
    asked: list[tuple[Any, str]] = []
    original = tuning.config

    def note(name: str, heuristic: Any, **shape: Any) -> Any:
        if name == op:
            asked.append((heuristic, tuning.key(**shape)))
        return original(name, heuristic, **shape)

    case = bench.case(op, with_config(op, None, bench.run))
    setattr(tuning, "config", note)  # noqa: B010
    try:
        jax.eval_shape(case.call, case.links[0], case.operands, case.state)
    finally:
        setattr(tuning, "config", original)  # noqa: B010
    return asked[0] if asked else None


def same(results: Any, expected: Any) -> bool:
    """Whether two results agree: integers exactly, floats by the norm of their difference."""
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        if x.shape != y.shape:
            return False
        if not jnp.issubdtype(x.dtype, jnp.floating):
            if not np.array_equal(x, y):
                return False
            continue
        a, b = (
            np.where(np.asarray(z, np.float32) > -1e29, z, 0).astype(np.float64) for z in (x, y)
        )
        if not float(np.linalg.norm(a - b)) <= TOLERANCE * max(float(np.linalg.norm(b)), 1e-30):
            return False
    return True


def results_of(op: str, bench: StepBench, config: Any) -> Any:
    """Return what the op makes of the first layer.

    The parts of `attend_zones` are merged, as configs cut it.
    """
    case = bench.case(op, with_config(op, config, bench.run))
    results, state = jax.jit(case.call)(case.links[0], case.operands, case.state)
    if op == "attend_zones":
        results = by_api("xla")("merge_states", *results)
    return jax.block_until_ready((results, state))


def tune(op: str, bench: StepBench, deadline: float) -> tuple[str, Any, dict[str, Any]] | None:
    """Return the table's key, the best config found, and how it was found.

    None without a config.
    """
    found = heuristic_of(op, bench)
    if found is None:
        return None
    config, key = found

    def seconds(config: Any) -> float:
        case = bench.case(op, with_config(op, config, bench.run))
        took, _ = time_calls(case.call, case.operands, case.state, links=case.links, runs=5)
        return took.median

    expected = results_of(op, bench, config)
    first = best = seconds(config)
    tried, improved = {config}, True
    while improved:
        improved = False
        for candidate in neighbours(config):
            if candidate in tried or time.monotonic() > deadline:
                continue
            tried.add(candidate)
            try:
                if not same(results_of(op, bench, candidate), expected):
                    print(f"    {candidate}: another result", flush=True)
                    continue
                took = seconds(candidate)
            except Exception as error:  # Too much shared memory, say: not a config to take.
                print(f"    {candidate}: {type(error).__name__}: {error}"[:160], flush=True)
                continue
            if took < best * (1 - GAIN):
                config, best, improved = candidate, took, True
                break
    return key, config, {"us": best * 1e6, "heuristic_us": first * 1e6, "tried": len(tried)}


def merge(path: Path, kind: str, op: str, key: str, config: Any) -> None:
    """Add one config to the table, which others may be writing to; whole or not at all."""
    with alone(path.parent):
        table = json.loads(path.read_text()) if path.exists() else {}
        table.setdefault(kind, {}).setdefault(op, {})[key] = dataclasses.asdict(config)
        write_text(path, json.dumps(table, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others from what they read and write in here; else one would undo what another adds."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def main() -> None:
    """Tunes op by op and shape by shape, until all are done or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(BENCHMARKED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ops", default=",".join(STEP_OPS), help="or attend_dense")
    parser.add_argument("--budget-seconds", type=float, default=400)
    parser.add_argument("--table", type=Path, default=tuning.TABLE)
    parser.add_argument("--again", action="store_true", help="tune what the table has, too")
    arguments = parser.parse_args()
    kind = tuning.device_kind()
    if kind is None:
        parser.error(f"there is no GPU to tune for: JAX runs on {jax.default_backend()}")
    deadline = time.monotonic() + arguments.budget_seconds
    shapes = names_from(parser, "--shapes", arguments.shapes, SHAPES)
    ops = names_from(parser, "--ops", arguments.ops, (*STEP_OPS, *OTHER_OPS))
    left = len(shapes) * len(ops)
    for name in shapes:
        bench = StepBench(SHAPES[name], by_api(None))
        for op in ops:
            # What is left of the time is for all that is left to tune.
            share = time.monotonic() + (deadline - time.monotonic()) / left
            left -= 1
            if time.monotonic() > deadline:
                print("out of time: run it again to go on")
                return
            try:
                asked = heuristic_of(op, bench)
                table = json.loads(arguments.table.read_text()) if arguments.table.exists() else {}
                if asked and asked[1] in table.get(kind, {}).get(op, {}) and not arguments.again:
                    continue
                found = tune(op, bench, share)
            except Exception as error:  # An op that fails must not keep the others untuned.
                print(f"{name} {op}: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            if found is None:
                print(f"{name} {op}: has no config", flush=True)
                continue
            key, config, facts = found
            merge(arguments.table, kind, op, key, config)
            print(f"{name} {op}: {config} {facts}", flush=True)


if __name__ == "__main__":
    main()
