"""Transformers' Llama as a baseline: each case is kept as it comes, and what is missing is told."""

import functools
import json
import re
import sys

import pytest

from tests.support.scripts import SCRIPTS, load_script

load = functools.cache(load_script)
MOVED = {"bytes_per_step": {"device": 4e9}}


def request(cases):
    model = load("decode_model").SHAPES["tiny"].to_json()
    # As it comes out of the pipe.
    return json.loads(json.dumps(load("torch_baseline").request_of(model, "float32", 3, 2, cases)))


def child(folder, *lines):
    """A Python in whose place these lines of a shell run."""
    python = folder / "python"
    python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    python.chmod(0o755)
    return str(python)


def test_a_process_that_ends_early_fails_the_cases_that_are_left(tmp_path):
    python = child(tmp_path, "echo '{\"batch\": 1}'", "echo no more memory >&2", "exit 3")
    cases = [(300, 1), (300, 2), (600, 1)]
    found = list(load("torch_baseline").time_transformers(request(cases), python))
    error = {"error": "the process ended with status 3: no more memory"}
    assert found == [{"batch": 1}, error, error]


def test_each_case_comes_as_soon_as_it_is_said(tmp_path):
    go_on = tmp_path / "go on"
    wait = f"until [ -e '{go_on}' ]; do sleep 0.05; done"
    python = child(tmp_path, "echo '{\"batch\": 1}'", wait, "echo '{\"batch\": 2}'")
    found = load("torch_baseline").time_transformers(request([(300, 1), (300, 2)]), python, 60)
    assert next(found) == {"batch": 1}
    go_on.touch()
    assert list(found) == [{"batch": 2}]


def test_a_process_that_says_nothing_is_ended(tmp_path):
    lines = "echo '{\"batch\": 1}'", "echo compiling >&2", "exec sleep 600"
    cases = [(300, 1), (300, 2), (600, 1)]
    python = child(tmp_path, *lines)
    found = list(load("torch_baseline").time_transformers(request(cases), python, 2))
    error = {"error": "the process gave no figures for 2 s: compiling"}
    assert found == [{"batch": 1}, error, error]


def test_without_torch_the_baseline_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = list(load("torch_baseline").figures(request([(300, 1), (300, "max")])))
    assert len(found) == 2
    for one in found:
        assert one["error"].startswith("missing: this baseline needs torch and transformers")


def test_the_model_is_described_by_all_that_llama_takes():
    source = (SCRIPTS / "torch_llama.py").read_text(encoding="utf-8")
    taken = set(re.findall(r'sizes\["(\w+)"\]', source))
    assert len(taken) > 8
    assert taken <= request([])["model"].keys()


def timed(monkeypatch, answers, contexts, batches):
    baselines, told = load("decode_baselines"), []
    monkeypatch.setattr(baselines, "time_transformers", lambda request: iter(answers))
    found = baselines.TransformersBaseline.timed(
        load("decode_model").SHAPES["tiny"],
        *("float32", 3, 2, contexts, batches, lambda case, one: told.append((case, one))),
    )
    cases = [(context, b) for context in contexts for b in batches if b != "common"]
    assert told == list(zip(cases, answers, strict=True))
    return found


def test_each_batch_asked_for_has_its_own_result(monkeypatch):
    failed = {"batch": 9, "error": "out of memory"}
    answers = [MOVED | {"batch": 1}, MOVED | {"batch": 6}, MOVED | {"batch": 1}, failed]
    found = timed(monkeypatch, answers, [300, 600], [1, "max", "common"])
    assert found.missing is None
    assert (found.largest(300), found.largest(600)) == (6, 9)
    assert found.attempt(6, 300, 2e12, "max")["floor_ms"] == pytest.approx(2)
    assert found.attempt(1, 600, 2e12, 1)["batch"] == 1
    # A maximum that failed is not the speed of one sequence.
    assert found.attempt(9, 600, 2e12, "max") == failed
    assert "not timed" in found.attempt(4, 300, 2e12, "common")["error"]
    assert found.attempt(6, 300, 2e12, "common")["batch"] == 6

    # Nor is a number that failed the maximum.
    answers = [{"batch": 64, "error": "out of memory"}, MOVED | {"batch": 32}]
    found = timed(monkeypatch, answers, [300], [64, "max"])
    assert found.largest(300) == 32
    assert found.attempt(32, 300, 2e12, "max")["batch"] == 32
    assert found.attempt(64, 300, 2e12, 64)["error"] == "out of memory"


def test_what_is_missing_is_told(monkeypatch):
    found = timed(monkeypatch, [{"error": "missing: torch sees no CUDA GPU"}], [300], [1])
    assert found.missing == "missing: torch sees no CUDA GPU"
    baselines = load("decode_baselines")
    monkeypatch.setattr(baselines, "time_transformers", lambda _: pytest.fail("it was started"))
    found = baselines.TransformersBaseline.timed(
        load("decode_model").SHAPES["tiny"], "float32", 3, 2, [300], ["common"], lambda *_: None
    )
    assert found.missing.startswith("missing: it runs before")


@pytest.mark.parametrize("missing", [False, True])
def test_each_case_is_written_as_it_comes(monkeypatch, tmp_path, capsys, missing):
    run, out = load("decode_run"), tmp_path / "results.json"
    report = run.Report(out)
    error = {"error": "missing: torch sees no CUDA GPU"}
    answers = [error, error] if missing else [MOVED | {"batch": 1}, MOVED | {"batch": 6}]
    written = []

    def answer(request):
        for one in answers:
            yield one
            content = json.loads((tmp_path / "results.unfinished.json").read_text())
            written.append(content["transformers"])

    monkeypatch.setattr(sys.modules["decode_baselines"], "time_transformers", answer)
    sizes = load("decode_model").SHAPES["tiny"]
    choices = run.time_outsider(sizes, "float32", 3, [300], [1, "max"], report)
    heads = [{"context": 300, "batch_asked": asked} for asked in (1, "max")]
    rows = [head | one for head, one in zip(heads, answers, strict=True)]
    assert written == [rows[:1], rows]
    assert [kind for kind, _, _ in choices] == ([] if missing else ["transformers"])
    said = capsys.readouterr().out
    assert f"transformers: {json.dumps(rows[1])}" in said
    if missing:
        content = json.loads((tmp_path / "results.unfinished.json").read_text())
        assert content["missing"] == {"transformers": error["error"]}
