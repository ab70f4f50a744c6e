"""What every route needs: the service, its metrics, and ways to ask and to stream."""

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from wavejax.engine.batching import Kept, Request
from wavejax.engine.prompt_text import EncodedPrompt
from wavejax.server import sse
from wavejax.server.answer_text import AnswerText
from wavejax.server.answering import Answering
from wavejax.server.documents import encode_about, open_document
from wavejax.server.errors import ApiError
from wavejax.server.grammar import Grammars
from wavejax.server.metrics import Metrics
from wavejax.server.schemas import Format, Sampling
from wavejax.server.service import Service, known_roles
from wavejax.server.thoughts import ThoughtSplitter
from wavejax.server.token_text import TokenText
from wavejax.server.toolset import Toolset


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Shared by the routes of one application.

    Attributes:
        service: the model.
        metrics: what is counted.
        token_text: texts of single tokens.
        grammars: for answers that are to have a form.
    """

    service: Service
    metrics: Metrics
    token_text: TokenText
    grammars: Grammars

    async def prepare(
        self,
        body: Sampling,
        messages: Sequence[Mapping[str, Any]],
        *,
        fields: tuple[str, str],
        new_tokens: int | None,
        logprobs: int | None = None,
        form: Format | None = None,
        template_args: Mapping[str, Any] | None = None,
        document: str | None = None,
        tools: Toolset | None = None,
    ) -> list[Request]:
        """Make what the engine is asked for to answer a conversation.

        Args:
            body: how tokens are drawn, and how many answers.
            messages: the conversation.
            fields: the names of those that have the conversation, and the answer's limit.
            new_tokens: the answer's limit; None: as many as there is room for.
            logprobs: how many of the most probable tokens to tell of.
            form: of the answer; None: any text.
            template_args: variables of the chat template.
            document: the name of a kept one, which the conversation is about.
            tools: functions that the model may call.

        Raises:
            ApiError, InputError: the body asks for what cannot be done.
        """
        service = self.service
        if document is not None and tools is not None:
            message = "a document is read without tools: leave `tools` or `document` out"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        constrained = form is not None and form.type != "text"
        forced = tools is not None and tools.forced
        if constrained and forced:
            message = "an answer is a call or has a form: leave `response_format` or `tools` out"
            raise ApiError(400, message, param="tool_choice")
        if (constrained or forced) and body.ignore_eos:
            message = "`ignore_eos` leaves JSON no end: leave it out, or what asks for JSON"
            raise ApiError(400, message, param="ignore_eos")

        def encode() -> tuple[EncodedPrompt, Kept | None]:
            if document is None:
                listed = None if tools is None else tools.tools
                prompt = service.encode_messages(messages, template_args, listed)
                return prompt, service.kept(prompt, new_tokens)
            kept, given = open_document(service.shelf, document), known_roles(messages)
            return encode_about(service.tokenizer, kept, given, template_args or {}), kept

        prompt, kept = await run_in_threadpool(encode)
        whose, param = fields
        most = service.new_tokens(prompt, new_tokens, param, whose, kept)
        requests = service.requests(body, prompt, most, logprobs, kept)
        if forced and tools is not None:
            first = await run_in_threadpool(self.grammars.call, tools)
        elif constrained and form is not None:
            first = await run_in_threadpool(self.grammars.constraint, form)
        else:
            return requests
        return [dataclasses.replace(request, constraint=first.copy()) for request in requests]

    def answer_text(self, request: Request, tools: Toolset | None = None) -> AnswerText:
        """Make what tells an answer's thoughts, text and calls apart.

        An answer of a form has no thoughts.
        """
        begun = self.service.thoughts_begun(request.prompt) if request.constraint is None else None
        splitter = None if begun is None else ThoughtSplitter(begun)
        return AnswerText(splitter, None if tools is None else tools.parser())

    def ask(self, requests: Sequence[Request], http: HttpRequest) -> Answering:
        """Submit requests; errors as of `Answering`. The access log will tell their tokens."""
        seconds = self.service.limits.request_seconds
        answering = Answering(self.service.engine, requests, seconds, self.metrics)
        http.scope["wavejax.tokens"] = lambda: (
            answering.prompt_tokens,
            answering.completion_tokens,
        )
        return answering

    def stream(self, chunks: AsyncIterator[Any], answering: Answering) -> EventSourceResponse:
        """Return a response of events, which cancels what was asked where the client goes."""
        seconds = self.service.limits.send_seconds
        return sse.stream(chunks, cancel=answering.cancel, send_seconds=seconds)
