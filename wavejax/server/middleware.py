"""Around every route: the access log, the API key, and how large and how slow a body may be."""

import asyncio
import secrets
import time
from typing import Any

from sse_starlette.sse import SendTimeoutError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wavejax.server.errors import CLIENT_GONE, ApiError
from wavejax.server.log import ACCESS, access_line
from wavejax.server.metrics import Metrics
from wavejax.server.service import Limits

# Those who watch over the server have no key; the page asks its reader for it.
_OPEN_PATHS = frozenset({"/", "/health", "/metrics"})


class AccessLog:
    """Logs one line a request when it has ended, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, complete, gone = time.perf_counter(), CLIENT_GONE, False, False

        async def receive_too() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        async def send_too(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive_too, send_too)
        except SendTimeoutError:
            gone = True
        finally:
            if gone or not complete:
                status = CLIENT_GONE
            tokens = scope.get("wavejax.tokens")
            used = None if tokens is None else tokens()
            self._metrics.http(status)  # first: who reads the line may look at the count
            ACCESS.info(access_line(scope, status, time.perf_counter() - began, used))


class ApiKey:
    """Refuses requests that do not show the key, before their bodies are read."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            wrong = self._wrong(dict(scope["headers"]).get(b"authorization"))
            if wrong is not None:
                refused = ApiError(
                    401, wrong, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _wrong(self, header: bytes | None) -> str | None:
        if header is None:
            return "there is no API key: send `Authorization: Bearer KEY`"
        kind, _, key = header.partition(b" ")
        if kind.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key):
            return None
        return "the API key is not this server's"


class BodyLimits:
    """Refuses bodies that are too large, or that take too long to arrive."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, seconds = self._limits.request_bytes, self._limits.body_seconds
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said[:20]) > most:
            await self._too_large(int(said[:20])).response()(scope, receive, send)
            return
        deadline, came, complete = time.monotonic() + seconds, 0, False

        async def receive_too() -> Message:
            nonlocal came, complete
            if complete:  # what comes now is the client's going
                return await receive()
            try:
                left = max(0.0, deadline - time.monotonic())
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError:
                text = f"the body took more than {seconds:g} s to arrive"
                raise ApiError(408, text, code="timeout") from None
            came += len(message.get("body", b""))
            if came > most:
                raise self._too_large(came)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_too, send)

    def _too_large(self, size: Any) -> ApiError:
        most = self._limits.request_bytes
        text = f"the body has {size} bytes or more, and {most} may be: send a shorter one"
        return ApiError(413, text, code="request_too_large")
