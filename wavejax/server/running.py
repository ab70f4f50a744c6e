"""Listening, and ending: a server drains before it ends."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from models.errors import InputError
from wavejax.server.log import ACCESS, ERRORS

# `timeout` and batch systems send a signal twice at once: that is one.
_SAME = 1.0
_ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class QuietServer(uvicorn.Server):
    """A server whose signals are someone else's: uvicorn would raise them again at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind a socket, which does not listen yet: clients are refused until it does.

    Args:
        host: a name, or an address of IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"`host={host}` is no address here: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {host}, port {port}: {reason}; give another `port` or `host`"
        ) from error
    return bound


def server_config(app: Any, drain_seconds: float) -> uvicorn.Config:
    """Return uvicorn's settings for an application.

    Args:
        app: the application.
        drain_seconds: at the end, for answers that come; then they are cancelled.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )


def serve(app: Any, bound: socket.socket, drain_seconds: float, ready: Callable[[], None]) -> int:
    """Serve until a signal ends it; in the main thread.

    SIGTERM, SIGHUP or Ctrl-C drains: no new connections, and answers that come go on to their ends.
    The second signal cancels them.

    Args:
        app: the application.
        bound: what to listen on.
        drain_seconds: after which answers that still come are cancelled.
        ready: called when clients can connect.

    Returns:
        the status to end with: 0, or 128 and the second signal's number.
    """
    server = QuietServer(server_config(app, drain_seconds))
    forced, first = 0, 0.0

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        # A function, not a method of the server: sse-starlette would end all streams at once.
        def end(number: int, frame: FrameType | None) -> None:
            nonlocal forced, first
            if not server.should_exit:
                server.should_exit, first = True, time.monotonic()
            elif time.monotonic() - first > _SAME:
                forced = number
                loop.call_soon_threadsafe(task.cancel)

        # Of a signal that is ignored, as by nohup, nothing is changed.
        taken = [number for number in _ENDS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, end) for number in taken}
        try:
            bound.listen(1024)
            ready()
            await server.serve([bound])
        except asyncio.CancelledError:
            if not forced:
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    with _logged_to_stderr():
        asyncio.run(run())
    return 128 + forced if forced else 0


@contextlib.contextmanager
def _logged_to_stderr() -> Iterator[None]:
    """One line a request, and errors with their tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = (ACCESS, ERRORS, logging.getLogger("uvicorn.error"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    ACCESS.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
