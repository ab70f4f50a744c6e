"""`scripts/bench_mosaic.py` goes on where kernels fail, as all do without a GPU, and tells why."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_tells_how_each_variant_failed(tmp_path):
    out = tmp_path / "results.json"
    options = ["--shapes", "smollm2", "--checked", "tiny96", "--seconds", "0.01", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "scripts/bench_mosaic.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert set(report["timed"]) == {"smollm2 score_clusters", "smollm2 attend_dense"}
    for variants in report["timed"].values():
        assert len(variants) >= 6
        assert all(found["error"] for found in variants.values())
    checked = report["checked"]["tiny96 attend_dense"]
    assert "head_dim is 96" in checked["heuristic"]["error"]
    assert "FAILED smollm2 attend_dense heuristic" in done.stdout
    assert "x Triton" in done.stdout
