"""`/v1/completions`: continuations of texts, or of tokens."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from wavejax.engine.batching import Kept, Piece
from wavejax.engine.prompt_text import EncodedPrompt
from wavejax.server import sse
from wavejax.server.answering import Answering, end_reason, progress_of
from wavejax.server.context import Context
from wavejax.server.documents import encode_after, open_document
from wavejax.server.errors import ApiError
from wavejax.server.schemas import CompletionBody, StreamOptions
from wavejax.server.service import Service

_MOST_PROMPTS = 128


def completion_router(context: Context) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Any:
        service = context.service
        service.check_model(body)
        if body.echo and body.logprobs is not None:
            message = "log-probabilities of a prompt are not to be had: give `echo` or `logprobs`"
            raise ApiError(400, message, param="echo", code="unsupported_parameter")
        encoded = await run_in_threadpool(_encode, service, body)
        asked, prompts = [], [prompt for prompt, _ in encoded]
        for prompt, kept in encoded:
            most = service.new_tokens(prompt, body.max_tokens, "max_tokens", "prompt", kept)
            asked += service.requests(body, prompt, most, body.logprobs, kept)
        answering = context.ask(asked, request)
        texts = [service.tokenizer.decode(prompt.ids) if body.echo else "" for prompt in prompts]
        text = _Text(context, body, answering, [one for one in texts for _ in range(body.n)])
        if body.stream:
            return context.stream(text.chunks(), answering)
        await answering.completions(request)
        return text.whole()

    return router


def _encode(service: Service, body: CompletionBody) -> list[tuple[EncodedPrompt, Kept | None]]:
    """Encode all prompts; with what each of them begins with."""
    given: Any = body.prompt
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts = [given] if single else given
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        message = f"`prompt` has {len(prompts)} prompts; give 1 to {_MOST_PROMPTS}"
        raise ApiError(400, message, param="prompt")
    document = None if body.document is None else open_document(service.shelf, body.document)
    encoded: list[tuple[EncodedPrompt, Kept | None]] = []
    for prompt in prompts:
        if document is not None:
            one = encode_after(service.tokenizer, document, prompt)
        elif isinstance(prompt, str):
            one = service.encode_text(prompt)
        else:
            one = EncodedPrompt(prompt, True)
        wrong = [token for token in one.ids if token >= service.vocab]
        if wrong:
            message = f"`prompt` has token {wrong[0]}; the model's are 0 to {service.vocab - 1}"
            raise ApiError(400, message, param="prompt")
        encoded.append((one, document or service.kept(one, body.max_tokens)))
    return encoded


class _Text:
    """The response to one request."""

    def __init__(
        self, context: Context, body: CompletionBody, answering: Answering, echoes: list[str]
    ):
        self.context, self.body, self.answering = context, body, answering
        self.echoes = echoes
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """Return the response in one."""
        choices = []
        for index, pieces in enumerate(self.answering.pieces):
            text = self.echoes[index] + "".join(piece.text for piece in pieces)
            reason = end_reason(pieces[-1].finish_reason)
            choices.append(_choice(index, text, self._logprobs(pieces, 0), reason))
        return {**self._about(), "choices": choices, "usage": self.answering.usage()}

    async def chunks(self) -> AsyncIterator[sse.ServerSentEvent]:
        """Yield the response in parts."""
        options = self.body.stream_options or StreamOptions()
        about = self._about()
        if options.include_usage:
            about["usage"] = None
        offsets = [0] * len(self.echoes)
        for index, echo in enumerate(self.echoes):
            if echo:
                yield sse.event({**about, "choices": [_choice(index, echo)]})
        async for index, event in self.answering.events():
            progress = progress_of(event)
            if isinstance(event, Piece):
                logprobs = self._logprobs([event], offsets[index])
                offsets[index] += len(event.text)
                reason = end_reason(event.finish_reason)
                if event.text or reason or (logprobs and logprobs["tokens"]):
                    choice = _choice(index, event.text, logprobs, reason)
                    yield sse.event({**about, "choices": [choice]})
            elif progress is not None and options.include_progress:
                yield sse.event({**about, "choices": [], "progress": progress})
        if options.include_usage:
            yield sse.event({**about, "choices": [], "usage": self.answering.usage()})
        yield sse.event(sse.DONE)

    def _about(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.context.service.name,
        }

    def _logprobs(self, pieces: list[Piece], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return self.context.token_text.completion_logprobs(pieces, offset)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
