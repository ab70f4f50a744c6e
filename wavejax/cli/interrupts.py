"""Ctrl-C and SIGTERM, from a command's first moment to its last.

Imports nothing that takes long: it comes before what does.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130, as shells have it
# A batch system's end; a terminal that is closed, which not every system says.
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Seconds after which a signal is raised again that ended nothing.
_AGAIN = 1.0
# `timeout` and batch systems send SIGTERM to a process, and at once again to its group: signals so
# many seconds apart are one, and do not disturb the cleaning up after the first.
_SAME = 2.0
_Handler = Callable[[int, FrameType | None], object] | int | None


class Terminated(BaseException):
    """SIGTERM or SIGHUP as an exception: what is unfinished is removed on its way.

    Attributes:
        signal: which of them.
        status: what the process ends with, as shells have it: 143 for SIGTERM.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        self.status = 128 + number
        super().__init__(self.signal.name)


def interrupts_end_the_process() -> None:
    """Has Ctrl-C end the process at once: one line, status 130.

    For all that comes before a command and after it: imports, in which an exception becomes a
    traceback or another error, and Python's own end. Changes nothing where Ctrl-C is ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Has Ctrl-C raise KeyboardInterrupt, and SIGTERM or SIGHUP Terminated, until it has effect.

    Raised once, it is lost where Python runs on behalf of C++ or of the garbage collector, which
    report it and go on: it is raised again each second, but not while it is being handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    # Who ignores a signal, or handles it, has a reason.
    ours = (signal.default_int_handler, _end, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDS)}
    taken: dict[int, _Handler] = {number: was for number, was in before.items() if was in ours}
    if not taken:
        yield
        return
    insist = _Insistent()
    taken[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    for number in taken:
        signal.signal(number, insist)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in taken.items():
            signal.signal(number, handler)


class _Insistent:
    """The handler of `raised_signals`."""

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self.raised_at = -_SAME

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        repeated = number == signal.SIGALRM or time.monotonic() - self.raised_at < _SAME
        if repeated and _is_interrupt(sys.exception()):
            return  # what handles the first goes on
        if number != signal.SIGALRM:
            self.number, self.raised_at = number, time.monotonic()
        raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated(self.number)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is an interruption, or came up while one was handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | Terminated):
            return True
        error = error.__context__
    return False
