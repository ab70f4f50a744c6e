"""Standard streams that are closed, full or left by their reader: a word and a status, or none."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import click
import pytest

from models.checkpoints.open import Checkpoint
from tests.wavejax.cli.conftest import Result
from wavejax import convert
from wavejax.cli.guard import main_guard
from wavejax.generate import main as generate_main

FULL_DISK = "error: cannot write to the standard output: No space left on device\n"


@click.command()
@click.option("--size", default=3)
def talkative(size: int) -> None:
    print("x" * size)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def writing(file: Path) -> None:
    with file.open("w") as opened:
        opened.write("x")


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A stream onto a disk without space."""
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    # What a test left in it is tried once more as it is closed.
    with contextlib.suppress(OSError), open("/dev/full", "w") as stream:
        yield stream


# A little is written as the command ends, much at once and past Python's buffer.
@pytest.mark.parametrize("arguments", [[], ["--size", "1000000"], ["--help"]])
def test_full_stdout_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    full: TextIO,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert main_guard(talkative)(arguments) == 2
    assert capsys.readouterr().err == FULL_DISK
    assert sys.stdout is full
    full.flush()  # as Python does at the end: there is nothing left that fails


def test_full_stdout_of_the_commands(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    full: TextIO,
    tiny: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert generate_main(["--model", str(tiny), "--plan", "--context", "100"]) == 2
    assert capsys.readouterr().err == FULL_DISK
    with open("/dev/full", "w") as another:
        monkeypatch.setattr(sys, "stdout", another)
        assert convert.main([str(tiny), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == FULL_DISK


def test_a_full_file_is_not_taken_for_stdout(full: TextIO) -> None:
    with pytest.raises(OSError, match="No space left"):
        main_guard(writing)(["/dev/full"])


@pytest.mark.parametrize("arguments, status", [([], 0), (["--help"], 0), (["--magic"], 2)])
def test_closed_streams_take_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
) -> None:
    # As Python has it where the caller closed them.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main_guard(talkative)(arguments) == status
    assert capsys.readouterr().err.startswith("error: ") == (status != 0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main_guard(talkative)(arguments) == status
    out = capsys.readouterr().out
    assert "error" not in out
    assert bool(out) == (status == 0)


def test_stderr_that_is_full(monkeypatch: pytest.MonkeyPatch, full: TextIO) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    assert main_guard(talkative)(["--magic"]) == 2


@click.command()
def saying() -> None:
    print("answer")
    for bar in range(3):
        print("x" * 100_000, bar, file=sys.stderr, flush=True)
    logging.getLogger("saying").warning("and this")


def test_a_stderr_that_takes_no_more_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: TextIO
) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    assert main_guard(saying)([]) == 0
    assert capsys.readouterr().out == "answer\n"
    full.flush()  # as Python does at the end: there is nothing left that fails


# With bars; with a logger that JAX has set up on the stderr of the start.
@pytest.mark.parametrize("more", [["--progress"], ["--json"]], ids=lambda more: more[0])
@pytest.mark.parametrize("kind", ["full", "left by its reader"])
def test_answers_are_whole_where_stderr_takes_no_more(
    tiny: Path, full: TextIO, kind: str, more: list[str]
) -> None:
    arguments = ["--model", str(tiny), "--raw", "--prompt", "hi", "--max-new-tokens", "3"]
    command = [sys.executable, "-m", "wavejax.generate", *arguments, "--attention", "full", *more]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_LOG_COMPILES": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    reader, writer = os.pipe()
    os.close(reader)
    stderr = full if kind == "full" else writer
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, check=False
    )
    os.close(writer)
    assert run.returncode == 0
    assert run.stdout.endswith("\n")
    if "--json" in more:
        assert len(json.loads(run.stdout)["answers"][0]["token_ids"]) == 3


def test_what_was_left_in_stderr_does_not_fail_the_end(full: TextIO) -> None:
    """As of a warning while modules are imported: Python writes it once more as it ends."""
    code = (
        "import contextlib, sys\n"
        "from wavejax.cli.entry import exit_process\n"
        "with contextlib.suppress(OSError):\n"
        "    print('a warning', file=sys.stderr)\n"
        "exit_process(0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    run = subprocess.run([sys.executable, "-c", code], stderr=full, env=environment, check=False)
    assert run.returncode == 0


def test_a_closed_stderr_is_not_a_file_that_is_opened_later(tmp_path: Path) -> None:
    """What C++ logs on descriptor 2 must not go into the first file that a run opens."""
    code = (
        "import os, sys\n"
        "from wavejax.cli.streams import open_closed_descriptors\n"
        "open_closed_descriptors()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "os.write(2, b'a log line')\n"
        "assert file.fileno() > 2\n"
    )
    script = f'{sys.executable} -c "$0" <&- 2>&-'
    assert subprocess.run(["bash", "-c", script, code], check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_facts_for_a_closed_stderr_do_not_go_to_stdout(
    generate: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", tiny, "--raw", "--prompt", "x", "--max-new-tokens", 1, "--json")
    for progress in ((), ("--no-progress",)):
        monkeypatch.setattr(sys, "stderr", None)
        result = generate(*arguments, *progress)
        assert result.status == 0
        assert result.out.count("\n") == 1


def test_closed_stdin(
    generate: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_params(*_: object) -> None:
        raise AssertionError("the weights were read before the input was checked")

    monkeypatch.setattr(Checkpoint, "load_params", load_params)
    monkeypatch.setattr(sys, "stdin", None)
    result = generate("--model", tiny, "--prompt-file", "-")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: the standard input, -, is closed: ")
    assert result.err.count("\n") == 1


def test_statuses_of_a_process(tiny: Path) -> None:
    """What a shell sees, where Python's own end of a process has its say too."""
    plan = f"{sys.executable} -m wavejax.generate --model {tiny} --plan --context 100"
    for redirected, status, said in (
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        (">&-", 0, ""),
        ("2>&- >&-", 0, ""),
        (">/dev/full", 2, FULL_DISK),
    ):
        command = ["bash", "-c", f"{plan} {redirected}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (status, said), redirected
