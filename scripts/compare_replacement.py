"""Compares replacement policies of the row cache on traces that `record_traces.py` wrote.

    python scripts/compare_replacement.py build/traces --json results.json --plot replacement.svg

Prints, for each method recorded, the rows that each policy misses by the cache's size, and what
single rows and groups of neighbouring rows miss and read. Means over the traces of a method.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

from tqdm import tqdm

from models.errors import InputError
from wavejax.cli.flags import in_flags
from wavejax.evaluation.files import replacing, write_growing
from wavejax.evaluation.replacement import study
from wavejax.evaluation.replacement.policies import policies
from wavejax.evaluation.replacement.simulate import PAGE_BYTES
from wavejax.evaluation.replacement.trace import Trace
from wavejax.evaluation.setup import make_room_for


def main() -> int:
    """Run the simulations; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+", help="files, or folders of them")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2],
        help="slots, as shares of the rows",
    )  # fmt: skip
    parser.add_argument("--warm-up", type=int, default=64, help="steps not counted")
    parser.add_argument("--row-bytes", type=int, default=512, help="to count pages: head dim 128")
    parser.add_argument("--page-bytes", type=int, default=PAGE_BYTES, help="of the host's memory")
    parser.add_argument(
        "--unit-policies", nargs="+", default=["LRU", study.OPTIMUM], help="to run on groups too"
    )
    parser.add_argument(
        "--unit-shares", type=float, nargs="+", default=[0.05], help="of the cache, for groups"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="draw the policies here (.svg, .png)")
    arguments = parser.parse_args()
    try:
        return compare(arguments)
    except InputError as error:
        print("error:", in_flags(str(error)), file=sys.stderr)
        return 2


def compare(arguments: argparse.Namespace) -> int:
    """Simulate, print and write."""
    known = [*policies(), study.OPTIMUM]
    for name in arguments.unit_policies:
        if name not in known:
            raise InputError(f"--unit-policies: {name!r} is none of {', '.join(known)}")
    make_room_for(arguments.json, arguments.plot)
    files = [
        file
        for given in arguments.traces
        for file in (sorted(given.glob("*.npz")) if given.is_dir() else [given])
    ]
    if not files:
        raise InputError("no traces there; record some with scripts/record_traces.py")
    traces = [Trace.load(file) for file in files]
    for file, trace in zip(files, traces, strict=True):
        if not {"method", "kl"} <= trace.about.keys():
            raise InputError(f"{file} does not say its method and KL; record_traces.py writes both")
    by_method = collections.defaultdict(list)
    cases = {
        trace.about["method"]: study.cases_of(
            trace.about["method"],
            arguments.shares,
            arguments.unit_policies,
            arguments.unit_shares,
        )
        for trace in traces
    }
    total = sum(len(cases[trace.about["method"]]) for trace in traces)
    with tqdm(total=total, disable=None) as bar:
        for number, trace in enumerate(traces, 1):
            method = trace.about["method"]
            reads = study.run(
                *(trace, cases[method], arguments.row_bytes, arguments.warm_up, bar.update),
                page_bytes=arguments.page_bytes,
            )
            by_method[method].append(reads)
            results = {
                case: mean
                for several in by_method.values()
                for case, mean in study.mean(several).items()
            }
            if arguments.json:
                found = {"traces": [one.about for one in traces[:number]]}
                found["reads"] = study.as_json(results)
                whole = number == len(traces)
                write_growing(arguments.json, json.dumps(found, indent=1), whole=whole)
    for method, several in by_method.items():
        own = [trace.about for trace in traces if trace.about["method"] == method]
        kl = sum(about["kl"] for about in own) / len(own)
        steps = sum(len(trace.rows) for trace in traces if trace.about["method"] == method)
        print(f"## {method}: {len(several)} traces, {steps} steps, KL {kl:.4f}\n")
        print(study.policy_table(results, method), end="\n\n")
        for policy in arguments.unit_policies:
            for share in arguments.unit_shares:
                table = study.unit_table(results, method, policy, share, arguments.page_bytes)
                print(table, end="\n\n")
    if arguments.plot:
        with replacing(arguments.plot) as part:
            study.plot(results, part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
