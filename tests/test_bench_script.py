"""`scripts/bench_kernels.py` runs anywhere, at a tiny shape and in plain JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTIONS = ("full_attention", "score_clusters", "select_clusters", "attend_dense")


def test_the_benchmark_reports_every_section(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "scripts/bench_kernels.py", "--shapes", "tiny", "--ops"]
    options = ["--implementation", "xla", "--calls", "1", "--seconds", "0.01", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, ",".join(SECTIONS), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["copy"]["best"] > 0
    assert report["device"] == "cpu"
    found = report["shapes"]["tiny"]
    assert set(found) == set(SECTIONS)
    for section in SECTIONS:
        assert "error" not in found[section], found[section]
        assert found[section]["us"] > 0
    assert "targets met" in done.stdout
