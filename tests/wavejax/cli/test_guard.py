"""What becomes of errors in a command, with commands made here."""

import errno
import io
import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import click
import jax
import pytest
from jax.errors import JaxRuntimeError

from models.errors import InputError
from wavejax.cli.guard import main_guard
from wavejax.cli.interrupts import Terminated


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
        (Terminated(signal.SIGTERM), 143, "terminated\n"),
        (Terminated(signal.SIGHUP), 129, "terminated\n"),
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


@pytest.fixture
def ask_for() -> Iterator[Callable[[str | None], None]]:
    """Sets which platforms the user asked JAX for; JAX has its own already."""
    before = jax.config.values["jax_platforms"]
    yield lambda platforms: jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_platforms", before)


def test_a_platform_that_is_not_there(
    capsys: pytest.CaptureFixture[str], ask_for: Callable[[str | None], None]
) -> None:
    """As JAX says it, and as it does not: of a platform without a plugin an assertion fails."""
    said = RuntimeError(
        "Unable to initialize backend 'cuda': no GPU (set JAX_PLATFORMS='' to automatically choose "
        "an available backend)"
    )

    @click.command()
    def unsaid() -> None:
        code = compile("assert False", "jax/_src/xla_bridge.py", "exec")
        exec(code)

    for command, reason in ((failing(said), "no GPU"), (unsaid, "no plugin")):
        ask_for("cuda,tpu")
        assert main_guard(command)([]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: JAX_PLATFORMS is cuda,tpu, which cannot be used here: ")
        assert reason in printed
        assert printed.count("\n") == 1
        # Where nobody asked for a platform, it is no mistake of the user's.
        ask_for(None)
        with pytest.raises((RuntimeError, AssertionError)):
            main_guard(command)([])


def test_other_errors_keep_their_traceback_where_a_platform_is_asked_for(
    ask_for: Callable[[str | None], None],
) -> None:
    ask_for("cpu")
    for error in (RuntimeError("another"), AssertionError()):
        with pytest.raises(type(error)):
            main_guard(failing(error))([])
