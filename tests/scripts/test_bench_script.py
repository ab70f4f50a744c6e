"""`scripts/bench_kernels.py` runs anywhere, at a tiny shape and in plain JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.shapes import SHAPES

ROOT = Path(__file__).parents[2]
SECTIONS = (
    *("full_attention", "score_clusters", "select_clusters", "attend_dense"),
    *("score_clusters-rank2", "attend_zones-rank4-int8"),
)


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


@pytest.mark.parametrize("op", ["score_tokens", "step", "step-pooled"])
def test_each_call_of_a_chain_has_a_query_of_its_own(op, monkeypatch):
    """Else XLA rotates and packs it once for all calls, which a model does in each layer."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from op_cases import StepBench, by_api
    from step_case import step_case

    bench = StepBench(SHAPES["tiny"], by_api("xla"), layers=2)
    steps = {"step": False, "step-pooled": True}
    case = step_case(bench, pooled=steps[op]) if op in steps else bench.case(op)
    jaxpr = jax.make_jaxpr(case.call)(case.links[0], case.operands, case.state).jaxpr
    layer, query = jaxpr.invars[:2]
    [reader] = [eqn for eqn in jaxpr.eqns if any(x is query for x in eqn.invars)]
    assert reader.primitive.name == "optimization_barrier"
    assert any(x is layer for x in reader.invars)
