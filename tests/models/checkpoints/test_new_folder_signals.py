"""Signals at any moment: a new folder is complete or not there, and no signal is lost."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints import new_folder
from models.checkpoints.new_folder import make_folder, signals_put_off


class Ended(Exception):
    """Raised by a handler of signals, as commands do."""


def end(*_: Any) -> None:
    raise Ended


@pytest.fixture
def handler() -> Iterator[None]:
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, previous in before.items():
        assert signal.signal(number, previous) == end


def touch(folder: Path) -> None:
    (folder / "file").touch()


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_nothing(number: signal.Signals, tmp_path: Path) -> None:
    def fill(unfinished: Path) -> None:
        touch(unfinished)
        signal.raise_signal(number)
        raise AssertionError("its handler raises")

    with pytest.raises(Ended):
        make_folder(tmp_path / "a" / "new", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize(
    "where, step, complete",
    [
        (Path, "mkdir", False),
        (os, "open", False),
        (new_folder, "_lock", False),
        (new_folder, "_remove", False),
        (Path, "rename", True),  # once it has its name it stays
        (Path, "unlink", True),
    ],
)
def test_signals_at_any_step(
    where: Any, step: str, complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do = getattr(where, step)

    def do_among_signals(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        done = do(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return done

    def fill(unfinished: Path) -> None:
        touch(unfinished)
        if step == "_remove":
            raise ZeroDivisionError

    monkeypatch.setattr(where, step, do_among_signals)
    with pytest.raises(Ended):
        make_folder(tmp_path / "a" / "new", fill)
    found = [path.name for path in tmp_path.rglob("*")]
    assert found == (["a", "new", "file"] if complete else [])


@pytest.mark.usefixtures("handler")
def test_signals_are_put_off() -> None:
    done = []

    @signals_put_off()
    def get_signals(error: Exception | None = None) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        if error is not None:
            raise error
        done.append(1)

    with pytest.raises(Ended):
        get_signals()
    assert done == [1]
    # Whatever else goes wrong, the signal is not lost.
    with pytest.raises(Ended):
        get_signals(ZeroDivisionError())


@pytest.mark.parametrize("kept", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_that_python_does_not_handle_are_left_alone(kept: signal.Handlers) -> None:
    before = signal.signal(signal.SIGTERM, kept)
    try:
        with signals_put_off():
            assert signal.getsignal(signal.SIGTERM) == kept
            if kept == signal.SIG_IGN:
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == kept
    finally:
        signal.signal(signal.SIGTERM, before)
