"""`scripts/bench_mosaic.py` goes on where kernels fail, as all do without a GPU, and tells why."""

import dataclasses
import json
import sys

import pytest

from tests.support.scripts import load_script


@pytest.fixture
def script(monkeypatch):
    module = load_script("bench_mosaic")
    # Of a dtype that the kernels take.
    small = dataclasses.replace(module.SHAPES["tiny"], dtype="bfloat16")
    monkeypatch.setitem(module.SHAPES, "small", small)
    return module


def run(script, monkeypatch, out, *options):
    options = ["--shapes", "small", "--seconds", "0.01", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", ["bench_mosaic.py", *options])
    script.main()


def test_it_tells_how_each_variant_failed(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    run(script, monkeypatch, out, "--checked", "tiny96")
    report = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    assert set(report["timed"]) == {"small score_clusters", "small attend_dense"}
    for variants in report["timed"].values():
        assert len(variants) >= 6
        assert all(found["error"] for found in variants.values())
    checked = report["checked"]["tiny96 attend_dense"]
    assert "head_dim is 96" in checked["heuristic"]["error"]
    said = capsys.readouterr().out
    assert "FAILED small attend_dense heuristic" in said
    assert "x Triton" in said


def test_what_was_found_of_an_op_stays_if_the_run_is_stopped(script, monkeypatch, tmp_path):
    out, found = tmp_path / "results.json", []
    out.write_text("of an earlier run")

    def errors(*_):
        if len(found) == 2:
            raise KeyboardInterrupt
        found.append({"error0": 0.5, "wrong0": "all"})
        return found[-1]

    monkeypatch.setattr(script, "results_of", lambda case: [])
    monkeypatch.setattr(script, "errors", errors)
    with pytest.raises(KeyboardInterrupt):
        run(script, monkeypatch, out, "--checked", "", "--ops", "score_clusters")
    report = json.loads((tmp_path / "results.unfinished.json").read_text())
    assert list(report["timed"]["small score_clusters"].values()) == found
    assert out.read_text() == "of an earlier run"


def test_a_reference_that_fails_is_told_and_the_other_op_goes_on(script, monkeypatch, tmp_path):
    case, out = script.StepBench.case, tmp_path / "results.json"

    def some_case(bench, op, run):
        if op == "score_clusters":
            raise ValueError("no reference")
        return case(bench, op, run)

    monkeypatch.setattr(script.StepBench, "case", some_case)
    run(script, monkeypatch, out, "--checked", "", "--variants", "heuristic")
    report = json.loads(out.read_text())["timed"]
    assert "no reference" in report["small score_clusters"]["all"]["error"]
    assert report["small attend_dense"].keys() == {"heuristic"}
