"""Ctrl-C and SIGTERM, at any moment of a command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from models.checkpoints.open import Checkpoint
from tests.wavejax.cli.conftest import Result
from wavejax import convert, loading
from wavejax.cli.guard import main_guard
from wavejax.engine.generator import Generator

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("module", ["generate", "convert"])
def test_nothing_long_is_imported_before_the_signals_are_set_up(module: str) -> None:
    code = (
        "import sys\n"
        f"from wavejax import {module}\n"
        "print([name for name in ('jax', 'numpy', 'click', 'tokenizers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# In the command's first module but one, in Python's own, in C that is loaded, and amid JAX.
@pytest.mark.parametrize("moment", ["wavejax.cli.entry", "click", "numpy._core", "jax._src.core"])
@pytest.mark.parametrize("name", ["generate", "convert"])
def test_an_interrupt_while_modules_are_imported(tmp_path: Path, name: str, moment: str) -> None:
    """From a module's import on; the module waits, so that the signal comes before the next."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = [sys.executable, "-m", f"wavejax.{name}", "a", "b"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_that_was_ignored_stays_ignored() -> None:
    """As of a job that a shell runs in the background."""
    code = (
        "import os, signal\n"
        "from wavejax.cli.interrupts import interrupts_end_the_process\n"
        "interrupts_end_the_process()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('goes on')\n"
    )
    script = f"trap '' INT; exec {sys.executable} -c \"$0\""
    run = subprocess.run(["bash", "-c", script, code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "goes on\n", "")


@pytest.mark.parametrize("number, status", SIGNALS)
def test_a_signal_that_is_lost_comes_again(
    capfd: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    lost = []

    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:  # as C++ that calls Python does
            lost.append(1)
        time.sleep(10)

    before = signal.getsignal(number)
    started = time.monotonic()
    assert main_guard(command)([]) == status
    assert lost
    assert 0.5 < time.monotonic() - started < 5
    # And then no more.
    assert signal.getsignal(number) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("number, status", SIGNALS)
def test_what_is_unfinished_is_removed_undisturbed(number: signal.Signals, status: int) -> None:
    """Longer than until a lost signal comes again; a second one comes at once, as `timeout`'s."""
    removed = []

    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            with contextlib.suppress(ValueError):
                os.kill(os.getpid(), number)
                time.sleep(1.5)
                raise ValueError
            time.sleep(0.2)
            removed.append(1)

    assert main_guard(command)([]) == status
    assert removed


def test_a_second_interrupt_ends_what_hangs_after_the_first() -> None:
    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            time.sleep(2.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

    started = time.monotonic()
    assert main_guard(command)([]) == 130
    assert time.monotonic() - started < 10


@pytest.fixture
def after_two_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Has a signal come once two tokens have been generated."""

    def prepare(number: signal.Signals) -> None:
        stream = Generator.stream

        def interrupted(self: Generator, *arguments: object) -> Iterator[object]:
            for steps, one in enumerate(stream(self, *arguments), 1):
                yield one
                if steps == 2:
                    os.kill(os.getpid(), number)
                    time.sleep(10)

        monkeypatch.setattr(Generator, "stream", interrupted)

    return prepare


ARGUMENTS = ("--raw", "--max-new-tokens", 40, "--attention", "full", "--prompt", "hello", "--model")


@pytest.mark.parametrize("number, status", SIGNALS)
def test_json_holds_what_there_is(
    generate: Callable[..., Result],
    tiny: Path,
    after_two_steps: Callable[[signal.Signals], None],
    number: signal.Signals,
    status: int,
) -> None:
    whole = json.loads(generate(*ARGUMENTS, tiny, "--json").out)
    assert whole["interrupted"] is None
    after_two_steps(number)
    result = generate(*ARGUMENTS, tiny, "--json")
    assert result.status == status
    assert result.err.split() == ["interrupted" if status == 130 else "terminated"]
    printed = json.loads(result.out)
    assert printed["interrupted"] == number.name
    (answer,), (expected,) = printed["answers"], whole["answers"]
    assert answer["finish_reason"] == "interrupted"
    # The first step alone, then a chunk of eight.
    assert len(answer["token_ids"]) == 9
    assert answer["token_ids"] == expected["token_ids"][:9]
    assert expected["text"].startswith(answer["text"].rstrip("\ufffd"))
    assert printed["facts"]["first_token_seconds"] > 0


def test_a_batch_is_printed_as_far_as_it_has_come(
    generate: Callable[..., Result], tiny: Path, after_two_steps: Callable[[signal.Signals], None]
) -> None:
    after_two_steps(signal.SIGINT)
    result = generate(*ARGUMENTS, tiny, "--prompt", "world")
    assert result.status == 130
    headers = [line for line in result.out.splitlines() if line.startswith("=== ")]
    assert headers == ["=== prompt 1 of 2 ===", "=== prompt 2 of 2 ==="]


def test_json_before_anything_was_generated(
    generate: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(Checkpoint, "load_params", interrupt)
    result = generate(*ARGUMENTS, tiny, "--json")
    assert result.status == 143
    printed = json.loads(result.out)
    assert printed["interrupted"] == "SIGTERM"
    assert printed["answers"][0]["token_ids"] == []
    monkeypatch.setattr(loading, "open_checkpoint", interrupt)
    assert generate(*ARGUMENTS, tiny, "--json")[:2] == (143, "")


def test_convert_that_is_terminated_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.checkpoints import open

    save = open.save_orbax

    def terminated(config: object, params: object, folder: Path, add_files: Callable) -> None:
        def add_and_end(unfinished: Path) -> None:
            add_files(unfinished)
            assert any(unfinished.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

        save(config, params, folder, add_and_end)

    monkeypatch.setattr(open, "save_orbax", terminated)
    assert convert.main([str(tiny), str(tmp_path / "new" / "model")]) == 143
    assert list(tmp_path.iterdir()) == []
