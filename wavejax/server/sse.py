"""Server-sent events: chunks of JSON, an error in their midst, and the end."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message

from wavejax.server.errors import as_api_error
from wavejax.server.log import failed

DONE = "[DONE]"


def event(data: Any, name: str | None = None) -> ServerSentEvent:
    """One event. In ASCII, since some clients split lines at any character that Unicode does."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return ServerSentEvent(text, event=name, sep="\n")


def stream(
    chunks: AsyncIterator[Any],
    *,
    cancel: Callable[[], None],
    send_seconds: float,
) -> EventSourceResponse:
    """Return the response that sends events as they come.

    Args:
        chunks: `ServerSentEvent`s. An error that they raise becomes the last event.
        cancel: called when the client has gone.
        send_seconds: for the client to take one event.
    """

    async def gone(_: Message) -> None:
        cancel()

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            told = as_api_error(error)
            if told.code == "internal_error":
                failed(error)
            yield event(told.body())
        finally:
            cancel()

    return EventSourceResponse(
        events(), sep="\n", send_timeout=send_seconds, client_close_handler_callable=gone
    )
