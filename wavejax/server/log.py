"""What a server logs: one line a request, and failures. Never a prompt's or an answer's text."""

import logging
import time
from typing import Any

ACCESS = logging.getLogger("wavejax.server.access")
ERRORS = logging.getLogger("wavejax.server.errors")
_MOST_CHARACTERS = 200


def failed(error: BaseException) -> None:
    """Log an error that nobody expected, with its traceback."""
    ERRORS.error("a request failed", exc_info=error)


def access_line(scope: Any, status: int, seconds: float, tokens: tuple[int, int] | None) -> str:
    """One request on one line: time, client, method, path, status, tokens, seconds.

    The path is as it came, still percent-encoded and without its query, so that no character of it
    can end the line.
    """
    client = scope.get("client")
    raw = scope.get("raw_path") or b"-"
    path = raw.partition(b"?")[0].decode("ascii", "backslashreplace")[:_MOST_CHARACTERS]
    came = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    used = "-" if tokens is None else f"{tokens[0]}+{tokens[1]}"
    who = client[0] if client else "-"
    return f"{came} {who} {scope['method']} {path} {status} {used} tokens {seconds:.3f} s"
