"""`/v1/responses`: OpenAI's newer way to ask, as far as text in and text out."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request

from wavejax.engine.batching import Piece
from wavejax.server import sse
from wavejax.server.answer_text import Thought, joined
from wavejax.server.answering import Answering, end_reason
from wavejax.server.context import Context
from wavejax.server.errors import ApiError
from wavejax.server.schemas import ResponseBody, Sampling
from wavejax.server.tool_calls import Call


def response_router(context: Context) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponseBody, request: Request) -> Any:
        context.service.check_model(body)
        requests = await context.prepare(
            Sampling(temperature=body.temperature, top_p=body.top_p, tolerance=body.tolerance),
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
        for piece in answering.pieces[0]:
            response.take(piece)
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
        self.reasoning_id = f"rs_{uuid.uuid4().hex}"
        self._reader = context.answer_text(answering.requests[0])
        self._thoughts, self._text, self._thought_tokens = "", "", 0
        self.created = int(time.time())
        self._numbers = itertools.count()
        self._begun: bool | None = None  # whether the item that has begun is the thoughts

    def whole(self) -> dict[str, Any]:
        """Return the response as it is at the end, of pieces that `take` was given."""
        pieces = self.answering.pieces[0]
        cut = end_reason(pieces[-1].finish_reason) == "length"
        status = "incomplete" if cut else "completed"
        usage = self.answering.usage()
        return {
            **self._about(status),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items(status),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
                "total_tokens": usage["total_tokens"],
                **{name: usage[name] for name in ("tolerance", "attention") if name in usage},
            },
        }

    async def events(self) -> AsyncIterator[sse.ServerSentEvent]:
        """Yield the response as events."""
        begun = self._about("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        async for _, event in self.answering.events():
            if isinstance(event, Piece):
                for part in self.take(event):
                    thought = isinstance(part, Thought)
                    text = part.text if isinstance(part, Thought) else part
                    for told in self._told(thought, text):
                        yield told
        if not self._text:
            for told in self._told(False, ""):
                yield told
        whole = self.whole()
        for told in self._item_done(False, whole["output"][-1]):
            yield told
        yield self._event(f"response.{whole['status']}", response=whole)

    def take(self, piece: Piece) -> list[Thought | str]:
        """Take in a piece of the answer; return what it says."""
        said = self._reader.push(piece.text, last=piece.finish_reason is not None)
        found = [one for one in said if not isinstance(one, Call)]
        thoughts, text, _ = joined(found)
        self._thoughts, self._text = self._thoughts + thoughts, self._text + text
        # Whatever comes before the text is thought, marks included.
        thinking = bool(self._thoughts) and not self._text
        self._thought_tokens += thinking and piece.token_id is not None
        return found

    def _told(self, thought: bool, text: str) -> Iterator[sse.ServerSentEvent]:
        """Yield the events of a part of the thoughts or of the text, and those of its item."""
        if self._begun != thought:
            if self._begun is not None:
                yield from self._item_done(True, self._items("completed")[0])
            self._begun = thought
            yield from self._item_added(thought)
        if text:
            where = self._where(thought)
            name = "reasoning_text" if thought else "output_text"
            more: dict[str, Any] = {} if thought else {"logprobs": []}
            yield self._event(f"response.{name}.delta", **where, delta=text, **more)

    def _item_added(self, thought: bool) -> Iterator[sse.ServerSentEvent]:
        where = self._where(thought)
        item = self._reasoning(None) if thought else self._message("in_progress", [])
        yield self._event(
            "response.output_item.added", output_index=where["output_index"], item=item
        )
        if not thought:
            yield self._event("response.content_part.added", **where, part=_part(""))

    def _item_done(self, thought: bool, item: dict[str, Any]) -> Iterator[sse.ServerSentEvent]:
        where = self._where(thought)
        if thought:
            yield self._event("response.reasoning_text.done", **where, text=self._thoughts)
        else:
            done = {"text": self._text, "logprobs": []}
            yield self._event("response.output_text.done", **where, **done)
            yield self._event("response.content_part.done", **where, part=_part(self._text))
        index = where["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _where(self, thought: bool) -> dict[str, Any]:
        index = int(bool(self._thoughts) and not thought)
        item_id = self.reasoning_id if thought else self.message_id
        return {"output_index": index, "item_id": item_id, "content_index": 0}

    def _items(self, status: str) -> list[dict[str, Any]]:
        message = self._message(status, [_part(self._text)])
        return [self._reasoning(self._thoughts), message] if self._thoughts else [message]

    def _reasoning(self, text: str | None) -> dict[str, Any]:
        about = {"id": self.reasoning_id, "type": "reasoning", "summary": []}
        return about if text is None else about | {"content": [_thought(text)]}

    def _event(self, name: str, **data: Any) -> sse.ServerSentEvent:
        number = next(self._numbers)
        return sse.event({"type": name, "sequence_number": number, **data}, name)

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


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
