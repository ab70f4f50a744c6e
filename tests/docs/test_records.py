"""Figures of README and docs are those of run records, and these of what was written down."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "docs/lab/runs").glob("*.json"))


@pytest.fixture
def records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/records"))
    import run_records
    import tables
    import write_tables

    return run_records, tables, write_tables


def test_tables_are_what_the_records_say(records):
    _, tables, write_tables = records
    runs, used = records[0].read_runs(), set()
    for page in write_tables.pages():
        text = page.read_text(encoding="utf-8")
        assert write_tables.with_tables(text, runs) == text, f"{page.name}: run write_tables.py"
        used |= {match[2] for match in write_tables.MARKED.finditer(text)}
    assert used == set(tables.TABLES)


def test_another_figure_makes_another_table(records):
    run_records, tables, write_tables = records
    runs = run_records.read_runs()
    text = "before\n<!-- table: speed -->\n<!-- end of table -->\nafter\n"
    written = write_tables.with_tables(text, runs)
    assert written.startswith("before\n<!-- table: speed -->\n| a decode step |")
    assert written.endswith("<!-- end of table -->\nafter\n")
    runs[tables.OPS["H200"]].figures["A"]["step"] = 100.0
    assert "| 976.3 us | 100.0 us | 9.8x |" in write_tables.with_tables(written, runs)


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_a_transcribed_figure_is_on_its_page(file, records):
    record = records[0].RunRecord(**json.loads(file.read_text(encoding="utf-8")))
    if record.page is None:
        return
    page = (ROOT / record.page).read_text(encoding="utf-8").replace(",", "")
    known = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", page)}
    missing = [value for value in records[0].leaves(record.figures) if abs(value) not in known]
    assert not missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figures": {}}, "not empty"),
        ({"figures": {"a": "7"}}, "must be numbers"),
        ({"command": ""}, "command must be"),
        ({"source": "results.json"}, "needs its commit"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_no_record_is_told_by_its_name(tmp_path, records, change, message):
    good = json.loads(RUNS[0].read_text(encoding="utf-8")) | {"commit": None}
    (tmp_path / "run.json").write_text(json.dumps(good | change), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^run\.json: .*{message}"):
        records[0].read_runs(tmp_path)


RESULTS = {
    "device": "NVIDIA H200",
    "jax": "0.11.2",
    "date": "2026-12-01 10:00:00",
    "shapes": {
        "batch8-128k": {"step": {"us": 139.5, "share": 0.7}, "note": "none"},
        "batch1-1m": {},
    },
}


def make_record(tmp_path, results, *arguments):
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    script = ROOT / "scripts/records/new_record.py"
    command = [sys.executable, script, tmp_path / "results.json", "--name", "new"]
    command += ["--conditions", "us", "--command", "bench", "--commit", "abc1234"]
    command += ["--out", tmp_path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_benchmarks_file_becomes_a_record(tmp_path, records):
    run = make_record(tmp_path, RESULTS, "--figures", "shapes/*/*/us")
    assert run.returncode == 0, run.stderr
    (tmp_path / "results.json").unlink()
    record = records[0].read_runs(tmp_path)["new"]
    assert record.figures == {"batch8-128k": {"step": 139.5}}
    assert (record.date, record.device) == ("2026-12-01T10:00:00", "NVIDIA H200")
    assert (record.commit, record.versions["jax"]) == ("abc1234", "0.11.2")
    again = make_record(tmp_path, RESULTS, "--figures", "shapes/*/*/us")
    assert again.returncode == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("results", "figures", "message"),
    [
        (RESULTS, "shapes/*/*/ms", "no figures at 'shapes/*/*/ms'"),
        (RESULTS, "shapes/batch8-128k/step/us", "no figures"),
        ({"shapes": {}}, "shapes/*", "lacks 'date'"),
    ],
)
def test_another_file_is_refused(tmp_path, results, figures, message):
    run = make_record(tmp_path, results, "--figures", figures)
    assert run.returncode == 2
    assert message in run.stderr
    assert not (tmp_path / "new.json").exists()
