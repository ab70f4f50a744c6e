"""Records the tokens of the generations in tests/support/generation_cases.py, on a CPU.

    JAX_PLATFORMS=cpu python scripts/record_generations.py --out tests/references/generations.json

Needs the default model. To be run only where what is generated is meant to change: the test that
compares (tests/wavejax/engine/test_recorded_generations.py) guards every other change.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import jax

from wavejax.evaluation.files import write_text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# At run time: the tests' helpers are not type-checked.
CASES = importlib.import_module("tests.support.generation_cases").CASES


def main() -> None:
    """Record every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    # As the tests set it.
    jax.config.update("jax_default_matmul_precision", "highest")
    lines = []
    for name, run in CASES.items():
        print(name, file=sys.stderr)
        lines.append(f"{json.dumps(name)}: {json.dumps(run())}")
    write_text(arguments.out, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
