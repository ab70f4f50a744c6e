"""Paths that cannot be looked at or written: one line on stderr, status 2, nothing half-written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from models.checkpoints.open import Checkpoint
from tests.wavejax.cli.conftest import Result
from wavejax import convert

LONG = "x" * 300  # no file system takes such a name


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_params(*_: object) -> None:
        raise AssertionError("the weights were read before the paths were checked")

    monkeypatch.setattr(Checkpoint, "load_params", load_params)


@pytest.fixture
def forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be looked into, not even by root, who runs tests in containers."""
    folder = tmp_path / "forbidden"
    folder.mkdir()
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    return folder


@pytest.fixture
def run_convert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Runs `python -m wavejax.convert`, which must leave nothing."""

    def run(*arguments: object) -> Result:
        before = sorted(os.walk(tmp_path))
        status = convert.main([str(argument) for argument in arguments])
        assert sorted(os.walk(tmp_path)) == before
        return Result(status, *capsys.readouterr())

    return run


def refused(result: Result, *said: str) -> None:
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


def test_models_that_cannot_be_looked_at(
    generate: Callable[..., Result], run_convert: Callable[..., Result], tmp_path: Path,
    forbidden: Path,
) -> None:  # fmt: skip
    for model, reason in (
        (LONG, "File name too long"),
        (forbidden / "model", "Permission denied"),
        (forbidden, "Permission denied"),  # there, but not what is in it
    ):
        refused(generate("--model", model, "--prompt", "x"), f"cannot look at {model}", reason)
        refused(run_convert(model, tmp_path / "new"), f"cannot look at {model}", reason)


def test_destinations_that_cannot_be_looked_at(
    run_convert: Callable[..., Result], tiny: Path, tmp_path: Path, forbidden: Path
) -> None:
    refused(run_convert(tiny, tmp_path / LONG), "cannot look at", "File name too long")
    refused(run_convert(tiny, tmp_path / LONG / "new"), "cannot look at", "File name too long")
    refused(run_convert(tiny, forbidden / "a" / "new"), "cannot look at", "Permission denied")


def test_destinations_that_cannot_be_written(
    run_convert: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    refused(run_convert(tiny, tmp_path / "file" / "new"), f"{tmp_path / 'file'} is no folder")
    (tmp_path / "link").symlink_to("nowhere")
    refused(run_convert(tiny, tmp_path / "link"), "exists already")
    access = os.access
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    refused(run_convert(tiny, closed / "a" / "new"), f"{closed} is not writable")


def test_memory_of_a_container(
    run_convert: Callable[..., Result],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wavejax.planning import free_memory as memory

    group = tmp_path / "group"
    group.mkdir()
    for name, text in (("max", "2000"), ("current", "1000"), ("stat", "inactive_file 0")):
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", group)
    refused(run_convert(tiny, tmp_path / "new"), "not enough memory")
