"""Standard streams that are closed or full, or whose reader went away."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def open_closed_descriptors() -> None:
    """Open closed standard streams onto nothing, before a file takes their numbers.

    What libraries log on number 2 would else be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def open_closed_streams() -> None:
    """Lets go of what is written to a stdout or stderr that is closed, as by `>&-`: it is None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


class Stdout:
    """A stream that remembers what went wrong in it, which tells that from a file's error."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, remembering an error."""
        with self._remembered():
            return self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream, remembering an error."""
        with self._remembered():
            self._stream.flush()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise


class Stderr:
    """A stream whose errors are nobody's: from the first one on, what it gets is let go of.

    Bars, facts and warnings must not fail a run whose answer was printed.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or let go of the stream."""
        try:
            return self._stream.write(text)
        except OSError:
            let_go(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or let go of it."""
        try:
            self._stream.flush()
        except OSError:
            let_go(self._stream)


def let_go(stream: Any) -> None:
    """Forgets what a stream did not take: Python would write it once more as it ends, and fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
        stream.flush()


def say(line: str) -> None:
    """Print a line on stderr, if that takes any: the status tells the same."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        let_go(sys.stderr)
