"""Prints what each kernel of a decode step's ops takes by itself, and the gaps between them.

    python scripts/profile_step.py --shapes batch8-128k,batch1-128k,batch1-1m

The times are the profiler's. While it watches, XLA launches kernels one by one and not as a CUDA
graph, so the gaps are not those of a run that nobody watches: `bench_kernels.py` has its time.
"""

import argparse
import collections
import statistics
import tempfile
from pathlib import Path

import jax
from gpu_timing import chain
from op_cases import StepBench, by_api, names_from
from step_case import step_case

from pallas_kernels.shapes import BENCHMARKED, SHAPES

CALLS = 8


def kernel_times(folder: Path) -> dict[str, list[float]]:
    """Microseconds of each run of each kernel in a profile, in the order of their first run."""
    [path] = folder.rglob("*.xplane.pb")
    found: dict[str, list[float]] = collections.defaultdict(list)
    events = [
        (event.start_ns, event.name, event.duration_ns / 1e3)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    for _, name, microseconds in sorted(events):
        found[name].append(microseconds)
    return found


def main() -> None:
    """Profiles one program of several steps at each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(BENCHMARKED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--implementation", choices=["triton", "xla"], default="triton")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"there is no GPU to profile: JAX runs on {jax.default_backend()}")
    for name in names_from(parser, "--shapes", arguments.shapes, SHAPES):
        case = step_case(StepBench(SHAPES[name], by_api(arguments.implementation)))
        program, state = chain(case.call, CALLS), case.state
        links, state = jax.device_put((case.links, state), jax.devices()[0])
        for _ in range(3):
            sample, state = jax.block_until_ready(program(links, case.operands, state))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                sample, state = jax.block_until_ready(program(links, case.operands, state))
            times = kernel_times(Path(folder))
        del sample, state, case
        print(f"{name}: us a run, runs a step")
        for kernel, each in times.items():
            print(f"  {kernel[:60]:60} {statistics.median(each):8.2f} {len(each) / CALLS:6.2f}")
        print(f"  {'all':60} {sum(map(sum, times.values())) / CALLS:8.2f}", flush=True)


if __name__ == "__main__":
    main()
