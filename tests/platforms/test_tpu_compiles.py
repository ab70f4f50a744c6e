"""The decode step compiled for TPUs that are not there, by `libtpu`. Compiled, not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.platform_packages import package_folder

pytestmark = pytest.mark.slow(240)

ROOT = Path(__file__).parents[2]


def programs(*arguments: object) -> dict[str, dict]:
    """What `scripts/compile_for_tpu.py` says of each program that it compiles, by name."""
    folder = package_folder("libtpu")
    paths = [str(ROOT), *([] if folder is None else [str(folder)])]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compile_for_tpu.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {facts["program"]: facts for facts in found}


KERNELS = ["attend_zones", "score_clusters"]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_smollm2s_step_compiles(chip):
    facts = programs("--chip", chip, "--model", "smollm2", "--tokens", 32_768)["decode_n"]
    assert facts["kernels"] == KERNELS
    assert 0 < facts["bytes"] < facts["memory"]


def test_smollm2s_step_with_staged_rows_compiles():
    given = "--model", "smollm2", "--tokens", 32_768, "--fetch", "staged"
    found = programs("--chip", "v5e", *given)
    assert set(found) == {"select", "attend", "finish"}
    for facts in found.values():
        assert 0 < facts["bytes"] < facts["memory"]


def test_llama_3_8bs_step_compiles():
    """With 16 GB of weights it is for the larger chip."""
    facts = programs("--chip", "v6e", "--model", "llama-3-8b")["decode_n"]
    assert facts["kernels"] == KERNELS
    assert facts["arguments"] > 16e9
    assert facts["bytes"] < facts["memory"]


def test_the_kernels_compile():
    """For every head dim, odd groups and both dtypes."""
    found = programs("--chip", "v6e", "--kernels")
    assert len(found) == 8
    for name, facts in found.items():
        assert facts["kernels"] == [name.split("-")[0]]
        assert 0 < facts["bytes"] < facts["memory"]
