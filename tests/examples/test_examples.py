"""Every example runs as a user runs it, and says what its header promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# By script: arguments, and what it must print.
EXPECTED = {
    "chat_with_document.py": ((), r"1907[\s\S]*tokens in the prompt, [1-9]\d* in the index"),
    "ask_kept_document.py": ((), r"kept them[\s\S]*1907[\s\S]*\(\d\d new tokens; first token"),
    "stream_tokens.py": ((), r"finished: (stop|length)\)\nanswer [01] \(\w+\): "),
    "answer_side_by_side.py": (
        (),
        r"colours done: True\nanswers by their end: \{.*'(stop|length)",
    ),
    "own_flax_model.py": ((), r"wave, a fifth: .* largest error of a logit"),
    "layer_step_in_jit_and_scan.py": ((), r"the index grew from \d+ to \d+ tokens"),
    "one_op.py": ((), r"output \(1, 4, 2, 64\), float32"),
    "full_against_wave.py": (("--out", "plot.png"), r"plot: plot\.png"),
    "profile_step.py": (("--out", "profile"), r"us in +\d+ runs"),
}
QUICK = {"one_op.py"}


def test_every_example_is_run_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == EXPECTED.keys()
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.M)
    assert set(listed) == scripts


def test_headers_say_what_it_shows_and_how_long_it_takes() -> None:
    for path in EXAMPLES.glob("*.py"):
        header = path.read_text(encoding="utf-8").split('"""')[1]
        assert re.search(r"^Shows |\n\nShows ", header), path.name
        assert re.search(r"\bTakes about\s+\d+\s+s\b", header), path.name
        assert f"python examples/{path.name}" in header


@pytest.mark.parametrize(
    "script",
    [
        script if script in QUICK else pytest.param(script, marks=pytest.mark.slow(30))
        for script in EXPECTED
    ],
)
def test_it_runs(script: str, tmp_path: Path) -> None:
    arguments, said = EXPECTED[script]
    # The checkout's packages; half the time to compile.
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    settings |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout
    if "--out" in arguments:
        out = tmp_path / arguments[1]
        assert any(out.rglob("*.xplane.pb")) if out.is_dir() else out.stat().st_size > 1000
