"""`/v1/responses`: OpenAI's newer way to ask, as far as text in and text out."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from wavejax.engine.batching import Piece
from wavejax.server import sse
from wavejax.server.answering import Answering, end_reason
from wavejax.server.context import Context
from wavejax.server.errors import ApiError
from wavejax.server.schemas import ResponseBody, Sampling


def response_router(context: Context) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponseBody, request: Request) -> Any:
        context.service.check_model(body)
        requests = await context.prepare(
            Sampling(temperature=body.temperature, top_p=body.top_p),
            messages_of(body),
            fields=("input", "max_output_tokens"),
            new_tokens=body.max_output_tokens,
            form=body.text.format if body.text else None,
            document=body.document,
        )
        answering = context.ask(requests, request)
        response = _Response(context, body, answering)
        if body.stream:
            return context.stream(response.events(), answering)
        await answering.completions(request)
        return response.whole()

    return router


def messages_of(body: ResponseBody) -> list[dict[str, Any]]:
    """Return the conversation that a body has.

    Raises:
        ApiError: there is none, or an item of it is no message.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise ApiError(400, "`input` is empty: give a text, or messages", param="input")
    for number, item in enumerate(body.input, 1):
        kind = item.get("type", "message")
        if kind != "message":
            message = f"`input` has {kind!r} as its item {number}; only messages are understood"
            raise ApiError(400, message, param="input", code="unsupported_parameter")
        messages.append({"role": item.get("role"), "content": item.get("content")})
    return messages


class _Response:
    """The response to one request."""

    def __init__(self, context: Context, body: ResponseBody, answering: Answering):
        self.context, self.body, self.answering = context, body, answering
        self.id = f"resp_{uuid.uuid4().hex}"
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._numbers = itertools.count()

    def whole(self) -> dict[str, Any]:
        """Return the response as it is at the end."""
        pieces = self.answering.pieces[0]
        cut = end_reason(pieces[-1].finish_reason) == "length"
        status = "incomplete" if cut else "completed"
        usage = self.answering.usage()
        return {
            **self._about(status),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(status, [_part(self._text())])],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    async def events(self) -> AsyncIterator[sse.ServerSentEvent]:
        """Yield the response as events."""
        begun = self._about("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = {"output_index": 0}
        message = self._message("in_progress", [])
        yield self._event("response.output_item.added", **item, item=message)
        part = {**item, "item_id": self.message_id, "content_index": 0}
        yield self._event("response.content_part.added", **part, part=_part(""))
        async for _, event in self.answering.events():
            if isinstance(event, Piece) and event.text:
                name = "response.output_text.delta"
                yield self._event(name, **part, delta=event.text, logprobs=[])
        text, whole = self._text(), self.whole()
        yield self._event("response.output_text.done", **part, text=text, logprobs=[])
        yield self._event("response.content_part.done", **part, part=_part(text))
        yield self._event("response.output_item.done", **item, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, name: str, **data: Any) -> sse.ServerSentEvent:
        number = next(self._numbers)
        return sse.event({"type": name, "sequence_number": number, **data}, name)

    def _text(self) -> str:
        return "".join(piece.text for piece in self.answering.pieces[0])

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.message_id, "type": "message", "role": "assistant"}
        return {**about, "status": status, "content": content}

    def _about(self, status: str) -> dict[str, Any]:
        body, sampler = self.body, self.answering.requests[0].sampler
        form = body.text.format if body.text and body.text.format else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.context.service.name,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampler.temperature,
            "text": {"format": form.model_dump() if form else {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampler.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
