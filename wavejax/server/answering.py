"""The engine's answers to one API request, as one stream; cancelled when nobody reads it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import numpy as np
from starlette.requests import Request as HttpRequest

from wavejax.engine.batching import Completion, Event, Handle, Piece, Progress, Request
from wavejax.engine.batching.reads import summary
from wavejax.engine.batching.request import completion_of
from wavejax.server.errors import ApiError, ClientGone
from wavejax.server.metrics import Metrics
from wavejax.server.service import Engine
from wavejax.store.tolerance import Met

EndReason = Literal["stop", "length"]


class Answering:
    """Requests to the engine whose events come together, in the order they happen.

    Args:
        engine: which answers.
        requests: one or more; all are taken, or none.
        seconds: after which all of them are cancelled.
        metrics: where the ends are counted.

    Raises:
        InputError, QueueFull, EngineClosed: as `submit`.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], seconds: float, metrics: Metrics
    ):
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, float, Event] | None] = asyncio.Queue()
        self._metrics = metrics
        self._seconds = seconds
        self.requests = requests
        self.pieces: list[list[Piece]] = [[] for _ in requests]
        self._handles: list[Handle] = []
        self._newest = [0.0 for _ in requests]
        try:
            for number, request in enumerate(requests):
                self._handles.append(engine.submit(request, _forward(loop, self._queue, number)))
        except BaseException:
            self.cancel()
            raise
        self._timer = loop.call_later(seconds, self._queue.put_nowait, None)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts: one that has several answers counts once."""
        return sum(len(request.prompt) for request in self.requests if request.sequence == 0)

    @property
    def completion_tokens(self) -> int:
        """Of all answers, as far as they have come."""
        return sum(piece.token_id is not None for pieces in self.pieces for piece in pieces)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage` of all answers together, as far as they have come."""
        cached = sum(
            pieces[-1].usage.cached_tokens
            for request, pieces in zip(self.requests, self.pieces, strict=True)
            if request.sequence == 0 and pieces and pieces[-1].usage is not None
        )
        prompt, completion = self.prompt_tokens, self.completion_tokens
        ends = [pieces[-1] for pieces in self.pieces if pieces]
        met = _met_by(ends)
        reads = [one.usage.reads for one in ends if one.usage is not None and one.usage.reads]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({} if met is None else {"tolerance": met._asdict()}),
            **({"attention": summary(reads)} if reads else {}),
        }

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the number of their request, to the end of all of them.

        Raises:
            ApiError: time ran out, or an answer ended by an error. All others are cancelled.
        """
        left = len(self.requests)
        try:
            while left:
                got = await self._queue.get()
                if got is None:
                    message = f"the answer took more than {self._seconds:g} s, and was cancelled"
                    raise ApiError(504, message, code="timeout")
                number, came, event = got
                if isinstance(event, Piece):
                    self._take(number, came, event)
                    left -= event.finish_reason is not None
                yield number, event
        finally:
            self.cancel()

    async def completions(self, client: HttpRequest) -> list[Completion]:
        """All answers, when all have ended.

        Raises:
            ApiError: as of `events`.
            ClientGone: the client has closed the connection; all are cancelled.
        """

        async def collect() -> None:
            async for _ in self.events():
                pass

        work = asyncio.ensure_future(collect())
        gone = asyncio.ensure_future(_disconnect(client))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            work.result()
        finally:
            self.cancel()
            work.cancel()
            gone.cancel()
        return [completion_of(pieces) for pieces in self.pieces]

    def cancel(self) -> None:
        """End what has not ended; of no effect afterwards."""
        for handle in self._handles:
            handle.cancel()
        timer = getattr(self, "_timer", None)
        if timer is not None:
            timer.cancel()

    def _take(self, number: int, came: float, piece: Piece) -> None:
        """Count a piece; raises ApiError where it ends its answer by an error."""
        if piece.token_id is not None:
            if self._newest[number]:
                self._metrics.token_gap(came - self._newest[number])
            self._newest[number] = came
        self.pieces[number].append(piece)
        if piece.usage is not None and piece.finish_reason is not None:
            self._metrics.ended(piece.usage, self.requests[number])
        if piece.finish_reason == "not finite":
            message = (
                "the model's logits were not finite (NaN or infinity): its weights are damaged"
            )
            raise ApiError(500, message, code="not_finite")
        if piece.finish_reason == "error":
            raise piece.error or ApiError(500, "the answer failed")
        if piece.finish_reason == "interrupted":
            raise ApiError(503, "the server is ending, and cancelled the answer", code="closing")


def _met_by(ends: Sequence[Piece]) -> Met | None:
    """How answers met their tolerances together, by their tokens; None where none has one."""
    told = [one.usage for one in ends if one.usage is not None and one.usage.tolerance is not None]
    weights = [max(1, usage.completion_tokens) for usage in told]
    if not told:
        return None
    shares = np.average([usage.tolerance for usage in told], axis=0, weights=weights)
    return Met(*shares.tolist())


def end_reason(reason: str | None) -> EndReason | None:
    """OpenAI's `finish_reason`; a stop string ends an answer as a stop token does."""
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def _forward(
    loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, number: int
) -> Callable[[Event], None]:
    # Holds no Answering: one that nobody holds drops its handles, which cancels.
    def forward(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (number, time.perf_counter(), event))

    return forward


async def _disconnect(client: HttpRequest) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


def progress_of(event: Event) -> dict[str, int] | None:
    """How far a prompt has been read, for a client; None for other events."""
    if not isinstance(event, Progress):
        return None
    return {"read_tokens": event.read_tokens, "prompt_tokens": event.prompt_tokens}
