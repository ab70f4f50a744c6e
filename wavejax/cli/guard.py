"""What the commands share: one-line errors, flags from dataclasses, prompts, progress bars."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import jax
from tqdm import tqdm

from models.errors import InputError
from wavejax._streams import Stdout, drop_stdout, open_closed_streams, say

Progress = Callable[[int, int], None]
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main_guard(
    command: click.Command, advice: str = "free some and try again"
) -> Callable[..., int]:
    """Wraps a command into `main(arguments=None) -> exit status`.

    Bad input, memory that runs out, or a stdout that takes no more, as on a full disk, becomes one
    line on stderr, `error: ...`, and status 2; Ctrl-C status 130; a reader that went away, as
    `head` does, status 141 and no word. A mistake in the program keeps its traceback.

    Args:
        command: what to run.
        advice: what to do where memory runs out.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        open_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show a character should not end a generation.
            sys.stdout.reconfigure(errors="replace")
        stdout = Stdout(sys.stdout)
        try:
            with contextlib.redirect_stdout(stdout):  # type: ignore[type-var]
                with _insistent_interrupts():
                    status = _invoke(command, sys.argv[1:] if arguments is None else arguments)
                stdout.flush()
        except click.ClickException as error:
            return _fail(error.format_message())
        except InputError as error:
            return _fail(str(error))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            what = out_of_memory(error)
            if what is None:
                raise
            return _fail(f"{what}; {advice}")
        except (KeyboardInterrupt, click.Abort):
            say("interrupted")
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            drop_stdout()
            return EXIT_BROKEN_PIPE
        except OSError as error:
            if error is not stdout.error:
                raise
            drop_stdout()
            return _fail(f"cannot write to the standard output: {error.strerror}")
        return status if isinstance(status, int) else 0

    return main


def _invoke(command: click.Command, arguments: Sequence[str]) -> Any:
    """Runs the command; what it returned, or the status that it asked click for.

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
    """What the user called, for the line that says how to: `python -m NAME`, or a file's name."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def exit_process(status: int) -> NoReturn:
    """Ends the process. Of a run that failed, without waiting for what the device still does.

    Python's own way out would free arrays that queued work still uses, and crash.
    """
    if status == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles for an accelerator, for later processes to read.

    In the user's cache folder, `wavejax/compiled`; where JAX's own JAX_COMPILATION_CACHE_DIR says
    another, there. Comes before anything is compiled; starts JAX's device. On a CPU nothing is
    kept: a program would be for one kind of CPU alone.
    """
    set_already = jax.config.values["jax_compilation_cache_dir"]
    if jax.default_backend() == "cpu" or set_already is not None:
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "wavejax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only folder, or a user without one
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt once a second until it ends what it should end.

    Raised once, it is lost where Python runs on behalf of C++ or of the garbage collector, which
    report it and go on.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # only the main thread receives signals; and who ignores them has a reason
        return

    def interrupt(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    alarm = signal.signal(signal.SIGALRM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, alarm)


def out_of_memory(error: BaseException) -> str | None:
    """One line that says which memory ran out and what was asked of it; None for other errors."""
    text = str(error)
    if isinstance(error, MemoryError):  # Python's own, and NumPy's
        return f"out of host memory ({text})" if text else "out of host memory"
    if "RESOURCE_EXHAUSTED" not in text and "CUDA_ERROR_OUT_OF_MEMORY" not in text:
        return None
    # XLA's allocator of pinned memory is xla_gpu_host_bfc.
    pinned = "host memory" in text or "gpu_host" in text
    reason = text.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
    return f"out of {'pinned host' if pinned else 'device'} memory ({reason})"


def _fail(message: str) -> int:
    say(f"error: {' '.join(message.split())}")
    return EXIT_BAD_INPUT


def options_from(settings: type) -> Callable[[Callable], Callable]:
    """One option for each field of a dataclass: `row_size: int = 4` becomes `--row-size INTEGER`.

    A bool becomes a pair of flags, `--x/--no-x`. Every field needs a default, which also gives its
    type, and `metadata["help"]`.
    """

    def decorate(function: Callable) -> Callable:
        for field in reversed(dataclasses.fields(settings)):
            flag = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            function = click.option(
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                type=kind,
                default=field.default,
                show_default=True,
                help=field.metadata["help"],
            )(function)
        return function

    return decorate


def fields_of(settings: type, options: dict[str, Any]) -> Any:
    """An instance of the dataclass from the options that `options_from` made; raises InputError."""
    return settings(**{field.name: options[field.name] for field in dataclasses.fields(settings)})


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """The prompts given on the command line, then those in files (`-` is the standard input).

    Raises InputError for a file that cannot be read, bytes that are not UTF-8, an empty prompt, or
    none at all.
    """
    named = [(f"prompt {i}", os.fsencode(text)) for i, text in enumerate(texts, 1)]
    if files.count("-") > 1:
        raise InputError("the standard input, -, can be only one of the prompt files")
    for file in files:
        if file == "-" and sys.stdin is None:
            raise InputError("the standard input, -, is closed: pipe the prompt in, or name a file")
        try:
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read prompt file {file}: {error.strerror}") from error
        named.append(("the standard input" if file == "-" else file, content))
    if not named:
        raise InputError("no prompt: give --prompt TEXT or --prompt-file FILE")
    return [_decode(name, content) for name, content in named]


def _decode(name: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start} "
            "begins no character; convert it to UTF-8 first"
        ) from error
    text = text.removeprefix("\ufeff")  # the mark that some editors put first
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text


@contextlib.contextmanager
def progress_bar(label: str, shown: bool) -> Iterator[Progress]:
    """A bar on stderr, gone when done; yields what to call with (done, total)."""
    with tqdm(desc=label, file=sys.stderr, leave=False, disable=not shown) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def bytes_text(count: int) -> str:
    """A number of bytes for reading: 1234567 is 1.2 MB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
