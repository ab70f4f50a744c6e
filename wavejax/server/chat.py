"""`/v1/chat/completions`: answers to a conversation."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from wavejax.engine.batching import Piece
from wavejax.server import sse
from wavejax.server.answering import Answering, end_reason, progress_of
from wavejax.server.context import Context
from wavejax.server.errors import ApiError
from wavejax.server.schemas import ChatBody, StreamOptions


def chat_router(context: Context) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        answering = await _ask(context, body, request)
        talk = _Talk(context, body, answering)
        if body.stream:
            return context.stream(talk.chunks(), answering)
        await answering.completions(request)
        return talk.whole()

    return router


async def _ask(context: Context, body: ChatBody, request: Request) -> Answering:
    context.service.check_model(body)
    if body.top_logprobs and not body.logprobs:
        message = "`top_logprobs` is for `logprobs`: set `logprobs`, or leave it out"
        raise ApiError(400, message, param="top_logprobs")
    if not body.messages:
        raise ApiError(400, "`messages` is empty: give at least one", param="messages")
    newer = body.max_tokens is None
    requests = await context.prepare(
        body,
        body.messages,
        fields=("messages", "max_completion_tokens" if newer else "max_tokens"),
        new_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=body.response_format,
        template_args=body.chat_template_kwargs,
        document=body.document,
    )
    return context.ask(requests, request)


class _Talk:
    """The response to one request."""

    def __init__(self, context: Context, body: ChatBody, answering: Answering):
        self.context, self.body, self.answering = context, body, answering
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """Return the response in one."""
        choices = []
        for index, pieces in enumerate(self.answering.pieces):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(pieces),
                    "finish_reason": end_reason(pieces[-1].finish_reason),
                }
            )
        about = self._about("chat.completion")
        return {**about, "choices": choices, "usage": self.answering.usage()}

    async def chunks(self) -> AsyncIterator[sse.ServerSentEvent]:
        """Yield the response in parts."""
        options = self.body.stream_options or StreamOptions()
        about = self._about("chat.completion.chunk")
        if options.include_usage:
            about["usage"] = None
        for index in range(self.body.n):
            delta = {"role": "assistant", "content": ""}
            yield sse.event({**about, "choices": [_choice(index, delta)]})
        async for index, event in self.answering.events():
            progress = progress_of(event)
            if isinstance(event, Piece):
                logprobs = self._logprobs([event])
                if event.text or (logprobs and logprobs["content"]):
                    choice = _choice(index, {"content": event.text}, logprobs)
                    yield sse.event({**about, "choices": [choice]})
                if event.finish_reason is not None:
                    choice = _choice(index, {}, None, end_reason(event.finish_reason))
                    yield sse.event({**about, "choices": [choice]})
            elif progress is not None and options.include_progress:
                yield sse.event({**about, "choices": [], "progress": progress})
        if options.include_usage:
            yield sse.event({**about, "choices": [], "usage": self.answering.usage()})
        yield sse.event(sse.DONE)

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.context.service.name,
        }

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        return self.context.token_text.chat_logprobs(pieces) if self.body.logprobs else None


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
