"""`scripts/bench_engine.py` runs anywhere, at a tiny shape; what it reports adds up."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
TINY = [
    *("--shape", "tiny", "--prompt-tokens", "300", "--long-tokens", "600", "--slots", "2"),
    *("--local-tokens", "8", "--growth-tokens", "64", "--cluster-size", "4"),
    *("--max-cluster-size", "8", "--segment-tokens", "128"),
    *("--min-candidate-tokens", "32", "--min-retrieved-tokens", "8"),
]


def bench(*options):
    return subprocess.run(
        [sys.executable, "scripts/bench_engine.py", *TINY, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow(90)
def test_each_part_is_measured(tmp_path):
    out = tmp_path / "engine.json"
    done = bench("--new-tokens", "32", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    busy, unequal, stall, document = report["parts"].values()
    assert [*report["parts"]] == ["busy", "unequal", "stall", "document"]
    rates = busy["engine_tokens_per_s"], busy["decode_n_tokens_per_s"]
    assert busy["ratio"] == pytest.approx(rates[0] / rates[1])
    assert 16 <= unequal["tokens"] <= 16 * 32
    assert unequal["ratio"] == pytest.approx(unequal["static_s"] / unequal["engine_s"])
    assert stall["gaps"] >= 1
    assert stall["ratio"] == pytest.approx(stall["longest_gap_ms"] / 250)
    assert document["ratio"] == pytest.approx(document["in_slot_s"] / document["read_s"])
    assert all(found["ratio"] > 0 for found in report["parts"].values())
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == [*report["parts"]]


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script, parts = map(importlib.import_module, ("bench_engine", "engine_parts"))

    def fail(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(script, "set_memory_limits", lambda pinned: None)  # of this process
    monkeypatch.setattr(parts, "stall", fail)
    monkeypatch.setattr(parts, "busy", lambda setting: {"ratio": 0.5, "slots": setting.slots})
    out = tmp_path / "engine.json"
    asked = [*TINY, "--parts", "stall,busy", "--out", str(out)]
    done = CliRunner().invoke(script.command, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["parts"] == {
        "stall": {"error": "MemoryError: none left"},
        "busy": {"ratio": 0.5, "slots": 2},
    }
    assert "failed" in done.output


def test_parts_that_there_are_not_are_refused():
    done = bench("--parts", "busy,idle")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --parts: 'idle' is none of busy, unequal, stall, document"
    ]
