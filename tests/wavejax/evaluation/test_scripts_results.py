"""What scripts found stays found: nothing is written in place, stopped runs leave their part."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.scripts import load_script
from wavejax.evaluation.files import write_growing
from wavejax.evaluation.replacement import study
from wavejax.evaluation.replacement.trace import Trace

ROOT = Path(__file__).parents[3]
SOURCES = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "wavejax" / "evaluation").glob("*.py")]


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return load_script(name)


def written_in_place(source):
    """The calls that write to a file that is not a part of `replacing`: (line, what)."""
    tree = ast.parse(source)
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        on, name = ast.unparse(call.func.value), call.func.attr
        to = ast.unparse(call.args[0]) if call.args else ""
        if name in ("write_text", "write_bytes") and on != "part":
            yield call.lineno, f"{on}.{name}"
        if name in ("savefig", "save", "savez", "savez_compressed") and to != "part":
            yield call.lineno, f"{on}.{name}({to})"
        if name == "dump" and on == "json":
            yield call.lineno, "json.dump"
        modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if name == "open" and any(isinstance(m, str) and set(m) & set("wax+") for m in modes):
            yield call.lineno, f"{on}.open({', '.join(modes)})"


def test_no_result_is_written_in_place():
    allowed = {
        "demo.py": {"file.write_text"},  # in a temporary folder
        # A lock is empty; lines are appended, all or none; a cut one is truncated.
        "records.py": {"folder / LOCK.open(w)", "path.open(r+b)"},
        "files.py": {"path.open(ab)"},
    }
    found = {
        file.name: {what for _, what in written_in_place(file.read_text(encoding="utf-8"))}
        for file in SOURCES
    }
    assert {name: what for name, what in found.items() if what} == allowed
    # And the search finds what it is for.
    for line in (
        "x.write_text('a')",
        "x.open('w')",
        "figure.savefig(path)",
        "np.save(path, x)",
    ):
        assert list(written_in_place(line))


def test_results_come_whole_or_beside(tmp_path):
    file = tmp_path / "found.json"
    file.write_text("of an earlier run")
    write_growing(file, "1", whole=False)
    write_growing(file, "1, 2", whole=False)
    unfinished = tmp_path / "found.unfinished.json"
    assert (file.read_text(), unfinished.read_text()) == ("of an earlier run", "1, 2")
    write_growing(file, "1, 2, 3", whole=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("found.json", "1, 2, 3")
    ]
    write_growing(tmp_path / "at once.json", "", whole=True)


def test_a_comparison_that_is_stopped_leaves_what_it_found(tmp_path, monkeypatch, capsys):
    module = script("compare_replacement", monkeypatch)
    rng = np.random.default_rng(0)
    for i in range(3):
        rows = np.sort(rng.permuted(np.tile(np.arange(64), (40, 1, 1, 1)), axis=-1)[..., :8])
        order = np.arange(64, dtype=np.int32).reshape(1, 1, 64)
        about = {"method": "wave", "kl": 0.1, "sample": i}
        Trace(rows.astype(np.int32), order, about).save(tmp_path / f"{i}.npz")
    out = tmp_path / "found.json"
    arguments = [*(str(tmp_path / f"{i}.npz") for i in range(3)), "--json", str(out)]
    arguments += ["--warm-up", "8", "--shares", "0.2", "--unit-policies", "LRU"]
    monkeypatch.setattr(sys, "argv", ["compare_replacement.py", *arguments])
    original, done = study.run, []

    def interrupted(*positional, **named):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*positional, **named)

    monkeypatch.setattr(study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert not out.exists()
    left = json.loads((tmp_path / "found.unfinished.json").read_text())
    assert [about["sample"] for about in left["traces"]] == [0, 1]
    assert left["reads"]
    monkeypatch.setattr(study, "run", original)
    assert module.main() == 0
    assert len(json.loads(out.read_text())["traces"]) == 3
    assert not (tmp_path / "found.unfinished.json").exists()


def test_benchmarks_save_after_each_section(monkeypatch):
    module = script("bench_kernels", monkeypatch)
    monkeypatch.setattr(module, "StepBench", lambda *_: None)
    monkeypatch.setattr(module, "bench_full_attention", lambda *_: {"us": 8.0})
    ran = []

    def bench_op(bench, op, *_):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(op)
        return {"us": 2.0}

    monkeypatch.setattr(module, "bench_op", bench_op)
    saved = []
    sections = ["full_attention", *module.STEP_OPS]
    with pytest.raises(KeyboardInterrupt):
        module.bench_shape(
            *(module.SHAPES["batch8-128k"], None, sections, 1.0, {}),
            lambda found: saved.append(list(found)),
        )
    assert saved[-1] == ["full_attention", *ran]
    assert len(saved) == 3


CODE = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
import tune_kernels
from pallas_kernels.build_clusters.triton import Config
for i in range(40):
    tune_kernels.merge(Path(sys.argv[1]), "a GPU", "build_clusters", sys.argv[2] + str(i), Config())
"""


def test_two_that_tune_keep_each_others_configs(tmp_path):
    table = tmp_path / "table.json"
    runs = [
        subprocess.Popen([sys.executable, "-c", CODE, str(table), name], cwd=ROOT)
        for name in ("one", "two")
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(json.loads(table.read_text())["a GPU"]["build_clusters"]) == 80
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
