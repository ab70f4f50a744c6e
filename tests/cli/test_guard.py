"""What the commands share, with commands made here."""

import dataclasses
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import jax
import pytest
from jax.errors import JaxRuntimeError

from models.errors import InputError
from wavejax.cli_support import (
    bytes_text,
    fields_of,
    keep_compiled_programs,
    main_guard,
    options_from,
)


def failing(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    "error, status, printed",
    [
        (InputError("two\nlines"), 2, "error: two lines\n"),
        (click.UsageError("odd"), 2, "error: odd\n"),
        (click.BadParameter("odd"), 2, "error: Invalid value: odd\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (EOFError(), 130, "\ninterrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (click.exceptions.Exit(3), 3, ""),
        (BrokenPipeError(), 141, ""),
        # As the system makes it, which click's own `main` would end the process for.
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_errors_become_a_line_and_a_status(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    printed: str,
) -> None:
    # A stdout of its own, which the handling of a broken pipe cannot take from the test.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main_guard(failing(error))([]) == status
    assert capfd.readouterr().err == printed


def test_usage_names_what_was_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = main_guard(failing(ZeroDivisionError()))
    called = SimpleNamespace(__spec__=SimpleNamespace(name="wavejax.generate"))
    monkeypatch.setitem(sys.modules, "__main__", called)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: python -m wavejax.generate [OPTIONS]\n")
    monkeypatch.setattr(called, "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", "--help"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("Usage: evaluate.py [OPTIONS]\n")


def test_mistakes_in_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main_guard(failing(ZeroDivisionError()))([])


@pytest.mark.parametrize(
    "error, said",
    [
        (
            JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nx"
            ),
            "out of device memory (Out of memory while trying to allocate 5 bytes)",
        ),
        (
            JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 5 bytes with "
                "allocator xla_gpu_host_bfc on device 0."
            ),
            "out of pinned host memory (Out of host memory while trying",
        ),
        (
            JaxRuntimeError("INTERNAL: Failed to load: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
            "out of device memory (INTERNAL: Failed to load: CUDA_ERROR_OUT_OF_MEMORY",
        ),
        (MemoryError("Unable to allocate 5 TiB"), "out of host memory (Unable to allocate 5 TiB)"),
        (MemoryError(), "out of host memory;"),
    ],
)
def test_running_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    assert main_guard(failing(error), advice="ask for less")([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {said}")
    assert printed.endswith("; ask for less\n")
    assert printed.count("\n") == 1


def test_other_errors_of_the_device_keep_their_traceback() -> None:
    with pytest.raises(JaxRuntimeError):
        main_guard(failing(JaxRuntimeError("INTERNAL: bug")))([])


@dataclasses.dataclass(frozen=True)
class Settings:
    row_size: int = dataclasses.field(default=4, metadata={"help": "rows"})
    share: float = dataclasses.field(default=0.5, metadata={"help": "share"})
    exact: bool = dataclasses.field(default=True, metadata={"help": "exact"})


def test_options_from_a_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @options_from(Settings)
    def command(**options: object) -> None:
        print(fields_of(Settings, options))

    main = main_guard(command)
    assert main([]) == 0
    assert capsys.readouterr().out == f"{Settings()}\n"
    assert main(["--row-size", "8", "--share", "1", "--no-exact"]) == 0
    assert capsys.readouterr().out == f"{Settings(8, 1.0, False)}\n"


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (99_960_000, "100 MB"),
     (999_600_000, "1.0 GB"), (10**13, "10.0 TB"), (10**16, "10000 TB")],
)  # fmt: skip
def test_bytes_for_reading(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_an_interrupt_that_is_lost_comes_again(capfd: pytest.CaptureFixture[str]) -> None:
    lost = []

    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:  # as C++ that calls Python does
            lost.append(1)
        time.sleep(10)

    started = time.monotonic()
    assert main_guard(command)([]) == 130
    assert lost
    assert 0.5 < time.monotonic() - started < 5
    # And then no more.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def kept() -> str | None:
    """Where JAX keeps compiled programs."""
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder, on a machine with a GPU, of someone who set nothing."""
    before = kept()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache(kept_in: Path) -> None:
    keep_compiled_programs()
    assert kept() == str(kept_in / "wavejax" / "compiled")
    assert (kept_in / "wavejax" / "compiled").is_dir()


def test_compiled_programs_are_kept_at_home(
    kept_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled_programs()
    assert kept() == str(tmp_path / ".cache" / "wavejax" / "compiled")


def test_where_the_user_keeps_programs_is_left_alone(kept_in: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_compiled_programs()
    assert kept() == str(tmp_path / "own")


def test_no_program_is_kept_on_a_cpu_or_where_none_can_be(
    kept_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept_in / "wavejax").write_text("a file in the way")
    keep_compiled_programs()
    assert kept() is None
    (kept_in / "wavejax").unlink()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    keep_compiled_programs()
    assert kept() is None
    assert not (kept_in / "wavejax").exists()
