"""Scripts that run long say at once what they could not use in the end: one line, status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError
from wavejax.evaluation.setup import make_room_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command, said",
    [
        ("record_traces.py --out OUT --context 200 --new-tokens 256", "--new-tokens 256 must be"),
        ("record_traces.py --out OUT --context 12000", "above the model's context, 8192 tokens"),
        ("record_traces.py --out FILE/traces --context 400", "cannot write"),
        ("compare_admission.py --context 12000", "above the model's context, 8192 tokens"),
        ("compare_admission.py --context 400 --json FILE/found.json", "cannot write"),
        ("compare_replacement.py OUT --unit-policies lru", "'lru' is none of LRU, FIFO"),
        ("compare_replacement.py OUT --json FILE/found.json", "cannot write"),
        ("bench_kernels.py --shapes A", "--shapes: 'A' is none of batch8-128k, batch1-128k"),
        ("report_bounds.py --length 512", "--length is 512, of which nothing is estimated"),
        ("compare_tolerance.py --lengths 512", "reads all of them and estimates nothing"),
        ("compare_tolerance.py --method quest", "must be wave, with settings if wanted"),
        ("plot_cost.py OUT --out FILE/found.png", "cannot write"),
        ("bench_decode.py --shape tiny --weight-dtype packed", "give one by --model"),
        (
            "bench_decode.py --shape tiny --baselines quest",
            "'quest' is none of host-managed, host-",
        ),
        (
            "bench_decode.py --contexts 999 --baselines host-managed",
            "of 999 tokens has no page of 16",
        ),
        ("profile_step.py --shapes batch8-128k", "there is no GPU to profile: JAX runs on cpu"),
    ],
)
def test_mistakes_are_said_before_anything_runs(tmp_path, command, said):
    file = tmp_path / "file"
    file.touch()
    command = command.replace("FILE", str(file)).replace("OUT", str(tmp_path / "out"))
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    *usage, line = done.stderr.splitlines()
    assert said in line
    # argparse shows how a script is used first.
    assert not usage or usage[0].startswith("usage:")


def test_folders_are_made_for_files_to_come(tmp_path):
    make_room_for(None, tmp_path / "new" / "one.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(InputError, match="name a file in a folder of yours"):
        make_room_for(tmp_path)
