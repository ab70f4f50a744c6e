"""What goes wrong on a GPU: memory that is really refused, and interrupts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wavejax.cli.test_faults import interrupted

pytestmark = [pytest.mark.gpu, pytest.mark.slow(60)]

# Three runs in a process: one that is fine, one for which the planner sees no end of memory, and
# the first again. The first fixes what XLA may pin.
RUNS = """
import contextlib, dataclasses, io, json, sys
import jax
from wavejax.planning import plan
from wavejax.generate import main

fine, too_much = json.loads(sys.argv[1])
real = plan.free_memory

def run(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    used = jax.local_devices()[0].memory_stats()["bytes_in_use"]
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "used": used}

results = [run(fine)]
plan.free_memory = lambda: plan.FreeMemory(2**60, 2**60, 2**60)
results.append(run(too_much))
plan.free_memory = real
results.append(run(fine))
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    "store, new_tokens, said",
    [("device", 10**9, "out of device memory"), ("host", 10**7, "out of pinned host memory")],
)
def test_memory_refused_past_the_planner(store, new_tokens, said, random_model):
    """The device's, and host memory beyond what XLA may pin."""
    common = ["--model", str(random_model), "--prompt", "The quick brown fox " * 100]
    common += ["--attention", "wave", "--store", store, "--max-context", str(2 * 10**9)]
    arguments = [[*common, "--max-new-tokens", str(count)] for count in (4, new_tokens)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", RUNS, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before, refused, after = json.loads(done.stdout.splitlines()[-1])
    assert before["status"] == 0, before
    assert (refused["status"], refused["out"]) == (2, ""), refused
    lines = [line for line in refused["err"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert refused["used"] <= before["used"]
    assert (after["status"], after["out"]) == (0, before["out"])


@pytest.mark.parametrize(
    "wait_for, stream",
    [(b"reading the prompt", "stderr"), (b"", "stdout")],
    ids=["prefill", "decode"],
)
def test_interrupt(
    wait_for: bytes, stream: str, random_model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    status, err, took = interrupted(random_model, tmp_path, wait_for, stream)
    assert status == 130, err
    assert "Traceback" not in err
    assert err.replace("\r", "\n").rstrip("\n").splitlines()[-1] == "interrupted"
    assert took < 30
