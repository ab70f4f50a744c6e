"""One request on its way: its times, its tokens as pieces, and its end."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models.text.tokenizer import Tokenizer
from wavejax.engine.batching.admission import room_of
from wavejax.engine.batching.handle import Channel
from wavejax.engine.batching.reads import Reads
from wavejax.engine.batching.request import (
    FinishReason,
    Piece,
    Progress,
    Request,
    TokenLogprobs,
    Usage,
)
from wavejax.engine.prompt_text import EncodedPrompt
from wavejax.engine.text import TokenDecoder
from wavejax.store.tolerance import Met


@dataclasses.dataclass(eq=False)
class Answer:
    """A request that was taken, until it ends.

    Attributes:
        number: in the order of `submit`.
        request: as checked; its prompt an array, its stop tokens a tuple.
        channel: where its pieces go.
        submitted: by the engine's clock, as all times; seconds.
        short: whether it may pass longer ones (see `line`).
        decoder: makes text of its tokens; None without a tokenizer.
        passed: how many requests that came later went first.
        started: when its reading began.
        read: when its prompt was read.
        first: when its first token came.
        token_ids: that came.
        dispatched: tokens that were drawn, or that the device was asked for.
        cached: tokens of the prompt that were not read anew.
        ended_by: why it ended; empty until then.
        met: says how the tolerance was met; waits for the device.
        reads: says what its steps have read; waits for the device.
    """

    number: int
    request: Request
    channel: Channel
    submitted: float
    short: bool = True
    decoder: TokenDecoder | None = None
    passed: int = 0
    started: float | None = None
    read: float | None = None
    first: float | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    dispatched: int = 0
    cached: int = 0
    ended_by: list[FinishReason] = dataclasses.field(default_factory=list)
    met: Callable[[], Met | None] = lambda: None
    reads: Callable[[], Reads | None] = lambda: None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def reason(self) -> FinishReason | None:
        """Why it ended; None until then."""
        return self.ended_by[0] if self.ended_by else None

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return len(self.token_ids)

    @property
    def room(self) -> tuple[int, int]:
        """Tokens that a slot must have room for: a prompt's, and an answer's."""
        return room_of(self.request)

    @property
    def left(self) -> int:
        """Steps that the device was not asked for yet."""
        return self.request.max_new_tokens - self.dispatched

    @property
    def watched(self) -> bool:
        """Whether each step's logits are looked at, or changed, by the host."""
        return self.request.logprobs is not None or self.request.constraint is not None

    def has_ended(self) -> bool:
        """Whether its last piece has come."""
        return self.reason is not None

    def tell(self, read_tokens: int) -> None:
        """Tell how far the prompt has been read."""
        self.channel.put(Progress(read_tokens, self.prompt_tokens))

    def take(self, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """Take a token; the answer may end with it."""
        if self.first is None:
            self.first = now
        self.token_ids.append(token)
        text, reason = "", None
        stops: Any = self.request.stop_tokens
        if token in stops:
            text, reason = self._flush(), "stop"
        else:
            if self.decoder is not None:
                text, found = self.decoder.push(token)
                reason = "stop_string" if found else None
            if reason is None and self.tokens >= self.request.max_new_tokens:
                text, reason = text + self._flush(), "length"
        self._put(token, text, now, logprobs, reason)  # type: ignore[arg-type]

    def end(self, reason: FinishReason, now: float, error: Exception | None = None) -> None:
        """End it without another token; of no effect on one that has ended."""
        if self.reason is None:
            self._put(None, self._flush(), now, None, reason, error)

    def _put(
        self,
        token: int | None,
        text: str,
        now: float,
        logprobs: TokenLogprobs | None = None,
        reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> None:
        if reason is not None:
            self.ended_by.append(reason)
        usage = None if reason is None else self._usage(now)
        self.channel.put(Piece(token, text, logprobs, reason, usage, error))

    def _flush(self) -> str:
        return "" if self.decoder is None else self.decoder.flush()

    def _usage(self, now: float) -> Usage:
        started = now if self.started is None else self.started
        read = now if self.read is None else self.read
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens,
            cached_tokens=self.cached,
            waited_seconds=started - self.submitted,
            read_seconds=max(0.0, read - started),
            first_token_seconds=None if self.first is None else self.first - self.submitted,
            total_seconds=now - self.submitted,
            tolerance=self.met(),
            reads=self.reads(),
        )


def decoder_of(tokenizer: Tokenizer | None, request: Request) -> TokenDecoder | None:
    """Return what makes text of an answer's tokens; None without a tokenizer.

    Raises:
        InputError: a stop string is empty.
    """
    if tokenizer is None:
        return None
    ids: Any = request.prompt
    return TokenDecoder(tokenizer, EncodedPrompt(ids.tolist(), request.raw), request.stop)
