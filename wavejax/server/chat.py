"""`/v1/chat/completions`: answers to a conversation."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request

from wavejax.engine.batching import Piece
from wavejax.server import sse
from wavejax.server.answer_text import Said, Thought, joined
from wavejax.server.answering import Answering, end_reason, progress_of
from wavejax.server.context import Context
from wavejax.server.errors import ApiError
from wavejax.server.schemas import ChatBody, StreamOptions
from wavejax.server.tool_calls import Call
from wavejax.server.toolset import Toolset, for_template, toolset_of


def chat_router(context: Context) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        context.service.check_model(body)
        tools = toolset_of(body, context.service.tokenizer)
        answering = await _ask(context, body, tools, request)
        talk = _Talk(context, body, tools, answering)
        if body.stream:
            return context.stream(talk.chunks(), answering)
        await answering.completions(request)
        return talk.whole()

    return router


async def _ask(
    context: Context, body: ChatBody, tools: Toolset | None, request: Request
) -> Answering:
    if body.top_logprobs and not body.logprobs:
        message = "`top_logprobs` is for `logprobs`: set `logprobs`, or leave it out"
        raise ApiError(400, message, param="top_logprobs")
    if not body.messages:
        raise ApiError(400, "`messages` is empty: give at least one", param="messages")
    newer = body.max_tokens is None
    requests = await context.prepare(
        body,
        for_template(body.messages),
        fields=("messages", "max_completion_tokens" if newer else "max_tokens"),
        new_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=body.response_format,
        template_args=body.chat_template_kwargs,
        document=body.document,
        tools=tools,
    )
    return context.ask(requests, request)


class _Talk:
    """The response to one request."""

    def __init__(
        self, context: Context, body: ChatBody, tools: Toolset | None, answering: Answering
    ):
        self.context, self.body, self.answering = context, body, answering
        self.texts = [context.answer_text(request, tools) for request in answering.requests]
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """Return the response in one."""
        choices = []
        for index, pieces in enumerate(self.answering.pieces):
            said = [part for piece in pieces for part in self._said(index, piece)]
            message = _message(*joined(said))
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(pieces),
                    "finish_reason": self._reason(index, pieces[-1]),
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
                for choice in self._choices(index, event):
                    yield sse.event({**about, "choices": [choice]})
            elif progress is not None and options.include_progress:
                yield sse.event({**about, "choices": [], "progress": progress})
        if options.include_usage:
            yield sse.event({**about, "choices": [], "usage": self.answering.usage()})
        yield sse.event(sse.DONE)

    def _choices(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a piece of an answer."""
        text, logprobs = self.texts[index], self._logprobs([piece])
        called = text.called
        deltas = [_delta(part) for part in self._said(index, piece)]
        if not deltas and logprobs and logprobs["content"]:
            deltas = [{"content": ""}]
        for delta in deltas:
            for call in delta.get("tool_calls", ()):
                call["index"], called = called, called + 1
            yield _choice(index, delta, logprobs)
            logprobs = None
        if piece.finish_reason is not None:
            yield _choice(index, {}, None, self._reason(index, piece))

    def _said(self, index: int, piece: Piece) -> list[Said]:
        return self.texts[index].push(piece.text, last=piece.finish_reason is not None)

    def _reason(self, index: int, last: Piece) -> str | None:
        reason = end_reason(last.finish_reason)
        return "tool_calls" if reason == "stop" and self.texts[index].called else reason

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.context.service.name,
        }

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        return self.context.token_text.chat_logprobs(pieces) if self.body.logprobs else None


def _message(thoughts: str, text: str, calls: list[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
    return message


def _delta(part: Said) -> dict[str, Any]:
    if isinstance(part, Thought):
        return {"reasoning_content": part.text}
    if isinstance(part, Call):
        return {"tool_calls": [_call(part)]}
    return {"content": part}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
