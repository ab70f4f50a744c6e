"""What every command runs in: errors of one line, statuses, signals, streams that fail."""

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax

from models.errors import InputError
from wavejax.cli.explaining import asked_for_kernels
from wavejax.cli.flags import in_flags
from wavejax.cli.interrupts import EXIT_INTERRUPTED, Terminated, raised_signals
from wavejax.cli.streams import Stderr, Stdout, let_go, open_closed_streams, say

EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it


def main_guard(
    command: click.Command, advice: str = "free some and try again"
) -> Callable[..., int]:
    """Wrap a command into `main(arguments=None) -> exit status`.

    Bad input, memory that runs out, a platform that JAX does not have, or a stdout that takes no
    more, as on a full disk, becomes one line on stderr, `error: ...`, and status 2. Ctrl-C is
    status 130, SIGTERM 143, SIGHUP 129. A reader that went away, as `head` does, is status 141 and
    no word. A stderr that takes no more changes nothing. A mistake in the program keeps its
    traceback. Errors of the library name parameters: here these become flags.

    Args:
        command: what to run.
        advice: what to do where memory runs out.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        open_closed_streams()
        with contextlib.redirect_stderr(Stderr(sys.stderr)):  # type: ignore[type-var]
            return _guarded(command, sys.argv[1:] if arguments is None else arguments, advice)

    return main


def _guarded(command: click.Command, arguments: Sequence[str], advice: str) -> int:
    """Run the command; the status to end with."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character should not end a generation.
        sys.stdout.reconfigure(errors="replace")
    stdout = Stdout(sys.stdout)
    try:
        with contextlib.redirect_stdout(stdout):  # type: ignore[type-var]
            with raised_signals():
                status = _invoke(command, arguments)
            stdout.flush()
    except click.ClickException as error:
        return _fail(error.format_message())
    except InputError as error:
        return _fail(in_flags(str(error)))
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return EXIT_INTERRUPTED
    except Terminated as error:
        say("terminated")
        return error.status
    except BrokenPipeError:
        let_go(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error is not stdout.error:
            raise
        let_go(sys.stdout)
        return _fail(f"cannot write to the standard output: {error.strerror}")
    except NotImplementedError as error:
        unsupported = asked_for_kernels(error)
        if unsupported is None:
            raise
        return _fail(unsupported)
    except (RuntimeError, AssertionError, MemoryError) as error:
        memory = out_of_memory(error)
        reason = missing_platform(error) if memory is None else f"{memory}; {advice}"
        if reason is None:
            raise
        return _fail(reason)
    return status if isinstance(status, int) else 0


def _invoke(command: click.Command, arguments: Sequence[str]) -> Any:
    """Run the command; what it returned, or the status that it asked click for.

    As `command.main(standalone_mode=False)` does, which would also end the process, with status 1,
    where a reader went away.
    """
    try:
        with command.make_context(_program_name(), list(arguments)) as context:
            return command.invoke(context)
    except click.exceptions.Exit as ended:  # --help
        return ended.exit_code
    except (EOFError, KeyboardInterrupt) as error:
        say("")  # ends the line where the terminal shows ^C
        raise click.Abort from error


def _program_name() -> str:
    """Return what the user called, for the line that says how to.

    It is `python -m NAME`, or a file's name.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def out_of_memory(error: BaseException) -> str | None:
    """One line that says which memory ran out and what was asked of it; None for other errors."""
    text = str(error)
    if isinstance(error, MemoryError):  # Python's own, and NumPy's
        return f"out of host memory ({text})" if text else "out of host memory"
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if "RESOURCE_EXHAUSTED" not in text and "CUDA_ERROR_OUT_OF_MEMORY" not in text:
        return None
    # XLA's allocator of pinned memory is xla_gpu_host_bfc.
    pinned = "host memory" in text or "gpu_host" in text
    reason = text.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
    return f"out of {'pinned host' if pinned else 'device'} memory ({reason})"


def missing_platform(error: BaseException) -> str | None:
    """One line about a platform that is asked for and not there; None for other errors."""
    asked = jax.config.values["jax_platforms"]
    innermost = traceback.extract_tb(error.__traceback__)[-1:]
    # Of a platform that it has no plugin for, JAX says nothing: an assertion fails.
    silent = any(Path(frame.filename).name == "xla_bridge.py" for frame in innermost)
    text = str(error)
    if not asked or not (silent or text.startswith("Unable to initialize backend")):
        return None
    reason = text.partition(": ")[2].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    reason = reason or "there is no such device, or JAX has no plugin for it installed"
    return (
        f"JAX_PLATFORMS is {asked}, which cannot be used here: {reason}; unset it, or set it to a "
        "platform that is there, such as cpu"
    )


def _fail(message: str) -> int:
    say(f"error: {' '.join(message.split())}")
    return EXIT_BAD_INPUT
