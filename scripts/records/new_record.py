r"""Makes a run record of a benchmark's JSON file.

    python scripts/bench_kernels.py --out results.json
    python scripts/records/new_record.py results.json --name 2026-12-01-ops-h200 \
        --figures 'shapes/*/*/us' --conditions "us; bfloat16; ..." \
        --command "python scripts/bench_kernels.py --out results.json"

Device, date and jax's version come from the file, the commit from git.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from run_records import ROOT, RUNS, RunRecord


def pick(results: Any, pattern: str) -> dict[str, Any]:
    """Return the figures at a path of names; those that a `*` stands for name them.

    Args:
        results: nested objects.
        pattern: as `shapes/*/*/us`, which gives `{"batch8-128k": {"step": 139.2}}`.

    Raises:
        ValueError: nothing is there.
    """
    found = _pick(results, pattern.split("/"))
    if not isinstance(found, dict) or not found:
        raise ValueError(f"no figures at {pattern!r}; it needs a `*` and must lead to numbers")
    return found


def _pick(value: Any, path: list[str]) -> Any:
    if not path:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number else None
    if not isinstance(value, dict):
        return None
    first, *rest = path
    if first != "*":
        return _pick(value.get(first), rest)
    named = {name: _pick(each, rest) for name, each in value.items()}
    return {name: each for name, each in named.items() if each not in (None, {})}


def commit_of(root: Path = ROOT) -> str:
    """Return the commit of the working tree.

    Raises:
        ValueError: there are changes that no commit has.
    """

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(root), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    if git("status", "--porcelain", "--untracked-files=no"):
        raise ValueError(
            "the working tree has changes that no commit has: commit them, or --commit"
        )
    return git("rev-parse", "--short", "HEAD")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON file that a benchmark wrote")
    parser.add_argument("--name", required=True, help="of the record: day and subject")
    parser.add_argument("--figures", required=True, help="which, as in shapes/*/*/us")
    parser.add_argument("--conditions", required=True, help="model, sizes, dtype and units")
    parser.add_argument("--command", required=True, help="which made the figures")
    parser.add_argument("--device", help="with what else of the machine counts; else the file's")
    parser.add_argument("--python", default=platform.python_version(), help="of the run")
    parser.add_argument("--commit", help="of the measured code; else the working tree's")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the records")
    arguments = parser.parse_args()
    file = arguments.out / f"{arguments.name}.json"
    if file.exists():
        parser.error(f"{file} exists: a record is never written anew")
    try:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
        record = RunRecord(
            date=results["date"].replace(" ", "T"),
            device=arguments.device or results["device"],
            commit=arguments.commit or commit_of(),
            versions={"jax": results["jax"], "python": arguments.python},
            command=arguments.command,
            source=arguments.results.name,
            conditions=arguments.conditions,
            figures=pick(results, arguments.figures),
        )
    except KeyError as error:
        parser.error(f"{arguments.results} lacks {error}: is it a benchmark's?")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    text = json.dumps(dataclasses.asdict(record), indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
