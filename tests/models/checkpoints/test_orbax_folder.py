"""A folder that cannot be written to its end: one line says why, and nothing is left of it."""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.checkpoints import new_folder, orbax
from models.checkpoints.new_folder import refuse_existing
from models.checkpoints.open import open_checkpoint, write_orbax
from models.errors import InputError
from models.paths import stat_of
from tests.support import tiny_models

CONFIG = tiny_models.CONFIGS["llama"]


class Writer:
    """Stands for Orbax's checkpointer; raises half-way."""

    def __init__(self, error: Exception):
        self.error = error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def save(self, folder: Path, _: object) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise self.error


@pytest.fixture
def write(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Writes a model to a folder below others that do not exist; nothing must be left of any."""
    source = tmp_path_factory.mktemp("source")
    tiny_models.write_folder(source, CONFIG, tiny_models.make_tensors(CONFIG))
    checkpoint = open_checkpoint(source)

    def run(add_files: Callable[[Path], None] = lambda _: None) -> None:
        try:
            write_orbax(checkpoint, tmp_path / "a" / "b" / "new", "float32", add_files=add_files)
        finally:
            assert list(tmp_path.iterdir()) == []

    return run


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("RESOURCE_EXHAUSTED: Failed [os_error_code='28']"), "No space left on device"),
        (Exception("File too large (os error 27)"), "File too large"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("of tensorstore,\non two lines"), "of tensorstore, on two lines"),
    ],
)
def test_errors_in_writing_are_one_line(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(_: Path) -> None:
        raise error

    with pytest.raises(InputError, match=f"a/b/new cannot be written: {said}$"):
        write(add_files=fail)
    monkeypatch.setattr(orbax, "_checkpointer", lambda: Writer(error))
    with pytest.raises(InputError, match=f"a/b/new cannot be written: {said}$"):
        write()


def test_mistakes_in_the_program_stay_what_they_are(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ZeroDivisionError(), MemoryError("Unable to allocate 5 TiB")):
        monkeypatch.setattr(orbax, "_checkpointer", lambda error=error: Writer(error))
        with pytest.raises(type(error)):
            write()


def test_a_thread_that_writes_on_is_waited_for(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, seen = new_folder.shutil.rmtree, []

    def remove_and_write(folder: Path, **options: bool) -> None:
        rmtree(folder, **options)
        if not seen:
            (folder / "params").mkdir(parents=True)
        seen.append(folder)

    monkeypatch.setattr(new_folder.shutil, "rmtree", remove_and_write)
    monkeypatch.setattr(orbax, "_checkpointer", lambda: Writer(OSError(28, "full")))
    with pytest.raises(InputError):
        write()
    assert len(seen) == 2


def test_a_quota_is_met(tmp_path: Path) -> None:
    """Files of a few kilobytes at most, in a process of its own: the real Orbax, and its threads.

    They would log what they met, a traceback each.
    """
    source = tmp_path / "source"
    tiny_models.write_folder(source, CONFIG, tiny_models.make_tensors(CONFIG))
    code = (
        "import resource, signal, sys\n"
        "from models.checkpoints.open import open_checkpoint, write_orbax\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "try:\n"
        "    write_orbax(open_checkpoint(sys.argv[1]), sys.argv[2], 'float32')\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, error)\n"
    )

    command = [sys.executable, "-c", code, str(source), str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout == f"InputError {tmp_path / 'new'} cannot be written: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_longest_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_models.write_folder(source, CONFIG, tiny_models.make_tensors(CONFIG))
    folder = tmp_path / ("é" * 127)  # of 254 bytes, out of 255
    write_orbax(open_checkpoint(source), folder, "float32")
    assert open_checkpoint(folder).kind == "orbax"


def test_logs_are_as_they_were(write: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    level, hook = logging.root.manager.disable, sys.unraisablehook
    monkeypatch.setattr(orbax, "_checkpointer", lambda: Writer(OSError(28, "full")))
    with pytest.raises(InputError):
        write()
    assert (logging.root.manager.disable, sys.unraisablehook) == (level, hook)


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    assert stat_of(tmp_path) is not None
    (tmp_path / "file").touch()
    for nothing in (tmp_path / "absent", tmp_path / "file" / "below"):
        assert stat_of(nothing) is None
        refuse_existing(nothing)
    (tmp_path / "link").symlink_to("nowhere")
    assert stat_of(tmp_path / "link") is None
    with pytest.raises(InputError, match="exists already"):
        refuse_existing(tmp_path / "link")
    for path, said in ((tmp_path / ("x" * 300), "File name too long"), (Path("a\0b"), "null byte")):
        for look in (refuse_existing, stat_of, open_checkpoint):
            with pytest.raises(InputError, match=f"cannot look at .*: .*{said}"):
                look(path)


class Ended(BaseException):
    """Raised by a handler of signals."""


def end(*_: object) -> None:
    raise Ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["while Orbax writes", "later"])
def test_interrupted_write_leaves_nothing(
    when: str, number: signal.Signals, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shell's background jobs, which a test run may be, start with interrupts ignored.
    handler = signal.default_int_handler if number == signal.SIGINT else end
    before = signal.signal(number, handler)

    def interrupt(_: object) -> None:
        signal.raise_signal(number)

    if when != "later":
        make_checkpointer = orbax._checkpointer
        monkeypatch.setattr(orbax, "_checkpointer", lambda: interrupt(None) or make_checkpointer())
    try:
        with pytest.raises((KeyboardInterrupt, Ended)):
            write(add_files=interrupt)
    finally:
        signal.signal(number, before)


def test_orbax_ends_before_a_signal_takes_effect(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    class Saver(Writer):
        def save(self, folder: Path, _: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            ended.append(folder)

    monkeypatch.setattr(orbax, "_checkpointer", lambda: Saver(OSError()))
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            write()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(ended) == 1


def test_what_a_killed_run_left_is_removed_before_the_weights_are_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_models.write_folder(source, CONFIG, tiny_models.make_tensors(CONFIG))
    left = tmp_path / ".new.unfinished-1-0123abcd"
    (left / "params").mkdir(parents=True)
    (tmp_path / f"{left.name}.lock").touch()
    seen = []
    write_orbax(
        open_checkpoint(source),
        tmp_path / "new",
        "float32",
        lambda *_: seen.append(left.exists()),
    )
    assert set(seen) == {False}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
