"""How a command starts and ends: signals and streams come before what takes seconds to import."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from wavejax.cli.interrupts import interrupts_end_the_process
from wavejax.cli.streams import let_go, open_closed_descriptors


def entry(module: str) -> tuple[Callable[..., int], Callable[[], NoReturn]]:
    """Return the two ways into a command, whose module is imported when one is taken.

    Args:
        module: which has the command's `main(arguments=None) -> exit status`.

    Returns:
        `main`, for callers in a program of their own; and `run`, which is the whole process.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        metadata = importlib.import_module("wavejax._metadata")  # takes long enough to be late
        metadata.import_jaxtyping()
        return importlib.import_module(module).main(arguments)

    def run() -> NoReturn:
        interrupts_end_the_process()
        open_closed_descriptors()
        exit_process(main())

    return main, run


def exit_process(status: int) -> NoReturn:
    """End the process. Of a run that failed, without waiting for what the device still does.

    Python's own way out would free arrays that queued work still uses, and crash.
    """
    interrupts_end_the_process()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
            try:
                stream.flush()
            except OSError:
                let_go(stream)
    if status == 0:
        sys.exit(0)
    os._exit(status)
