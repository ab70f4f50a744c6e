"""What a request asks for, and what comes back: pieces, progress, errors."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from models.errors import InputError
from wavejax.attention.protocol import AnyAttention
from wavejax.engine.batching import tolerances
from wavejax.engine.batching.reads import Reads
from wavejax.engine.checks import MOST_INT32, as_prompts, as_stop_tokens, whole_number
from wavejax.engine.interface import Engine
from wavejax.engine.sampling import Sampler
from wavejax.store.tolerance import Met

MOST_LOGPROBS = 20

FinishReason = Literal["stop", "stop_string", "length", "not finite", "interrupted", "error"]
"""Why an answer ended: as `wavejax.engine.text.FinishReason`, or by an error of its own."""


class QueueFull(RuntimeError):
    """No more requests can wait. Send the request again later.

    Attributes:
        waiting: requests that wait.
        limit: the most that may.
    """

    def __init__(self, waiting: int, limit: int):
        super().__init__(
            f"{waiting} requests wait, and {limit} may: send the request again later, or give the "
            "engine a larger `queue_limit`"
        )
        self.waiting, self.limit = waiting, limit


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it drains, was closed, or has failed."""


@runtime_checkable
class Constraint(Protocol):
    """Says which tokens may come next, for one request: a grammar's state.

    The engine calls it in its own thread: `allowed` before each token, `accept` after it. An error
    that it raises ends its request alone.
    """

    def allowed(self) -> np.ndarray:
        """Return the tokens that may come next: `[vocab]` bool, at least one of them."""

    def accept(self, token: int) -> None:
        """Take in the token that came."""


@runtime_checkable
class Restorable(Protocol):
    """A kept sequence on its way into a slot, step by step; the slot's lengths come last."""

    @property
    def steps(self) -> int:
        """Count the steps that are left."""

    def step(self, attention_state: Any) -> Any:
        """Do one step, and return the attention state that takes the donated one's place."""

    def close(self) -> None:
        """Do no more, and let go of what is on its way; of no effect after the last step."""


@runtime_checkable
class Kept(Protocol):
    """What was read before, and some prompts begin with: a `wavejax.documents.Document`."""

    def reused(self, prompt: Sequence[int] | np.ndarray) -> int:
        """Count the prompt's first tokens that need not be read."""

    def room_of(self, prompt: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """Count the room that a prompt needs: a prompt's, and, besides its answer, an answer's."""

    def last_logits(self) -> np.ndarray:
        """Return the logits of the token after the last one that is kept, `[vocab]`."""

    def restoring(
        self, engine: Engine, attention_state: Any, slot: int, prompt: np.ndarray
    ) -> Restorable:
        """Begin to put what `reused` counts into a slot; raises InputError where it cannot be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt to answer.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the answer ends after this number of tokens, one or more.
        sampler: how its tokens are drawn, penalties included.
        seed: of its noise, an int32.
        sequence: the number by which its noise is keyed: samples of one prompt are requests with
            0, 1, 2, ...
        stop_tokens: the answer ends after any of these; None: the engine's; empty: none.
        stop: texts that end the answer before they begin. The engine needs a tokenizer for them.
        logprobs: how many of the most probable tokens to tell the log-probability of, 0 to 20,
            besides the token's own; None tells none.
        raw: whether the answer continues the prompt's text; else it is a text of its own.
        constraint: what may come next; None: anything.
        kept: what the prompt begins with, so that the rest alone is read; None: nothing.
        tolerance: of attention's relative error, by an engine that has one; 0: none; None: the
            engine's.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int = 256
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    seed: int = 0
    sequence: int = 0
    stop_tokens: Iterable[int] | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    raw: bool = False
    constraint: Constraint | None = None
    kept: Kept | None = None
    tolerance: float | None = None

    def checked(
        self, vocab: int, stop_tokens: tuple[int, ...], attention: AnyAttention
    ) -> "Request":
        """Return the same request with numbers of Python's own, its prompt as an array.

        Args:
            vocab: how many tokens the model has.
            stop_tokens: what None stands for.
            attention: the engine's.

        Raises:
            InputError: a token is not the model's, a number is no whole one or out of range, or
                the attention has no tolerance.
        """
        own = self.stop_tokens
        if not isinstance(self.sampler, Sampler):
            raise InputError(f"`sampler` is of type {type(self.sampler).__name__}; give a Sampler")
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = whole_number("`logprobs`", logprobs, 0, min(MOST_LOGPROBS, vocab))
        prompt = as_prompts([self.prompt], vocab)[0]
        return dataclasses.replace(
            self,
            prompt=prompt,
            kept=self.kept if self.kept is not None and self.kept.reused(prompt) else None,
            max_new_tokens=whole_number("`max_new_tokens`", self.max_new_tokens, 1, MOST_INT32),
            seed=whole_number("`seed`", self.seed, -MOST_INT32 - 1, MOST_INT32),
            sequence=whole_number("`sequence`", self.sequence, 0, MOST_INT32),
            stop_tokens=stop_tokens if own is None else as_stop_tokens(own, vocab),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logprobs=logprobs,
            tolerance=tolerances.checked(self.tolerance, attention),
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: of its prompt.
        completion_tokens: that came, a stop token at the end included.
        cached_tokens: of the prompt's, those that were not read anew.
        waited_seconds: from `submit` to the prompt's first layer; all of it, if that never came.
        read_seconds: from then to the prompt's last layer.
        first_token_seconds: from `submit` to the first token; None if none came.
        total_seconds: from `submit` to the end.
        tolerance: how the steps that the device did for it met its tolerance; None without one.
        reads: what these steps read, by wave attention; None by another, and without a step.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    waited_seconds: float
    read_seconds: float
    first_token_seconds: float | None
    total_seconds: float
    tolerance: Met | None = None
    reads: Reads | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a prompt has been read.

    Attributes:
        read_tokens: as a part of the prompt's: layers read are counted as tokens.
        prompt_tokens: the prompt's.
    """

    read_tokens: int
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities by the model's own logits: before penalties, temperature and cuts.

    Attributes:
        logprob: of the token that came.
        top: token ids and log-probabilities of the most probable tokens, the best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of an answer; at its end at times a piece without a token.

    Attributes:
        token_id: the token; None for text that was held back until the end.
        text: the text that it completes: "" while a character lacks bytes, while a stop string may
            have begun, and for special tokens; always "" without a tokenizer.
        logprobs: if they were asked for.
        finish_reason: why the answer ended with this piece; None while it has not.
        usage: what the request took; with the last piece.
        error: with the finish reason "error".
    """

    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None


Event = Progress | Piece


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        token_ids: all tokens, a stop token at the end included.
        finish_reason: why it ended.
        usage: what it took.
        logprobs: of each token, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] | None = None


def completion_of(pieces: Sequence[Piece]) -> Completion:
    """Join an answer's pieces, the last of which has a finish reason.

    Raises:
        Exception: the error of the finish reason "error".
    """
    last = pieces[-1]
    if last.error is not None:
        raise last.error
    assert last.finish_reason is not None
    assert last.usage is not None
    found: list[Any] = [piece.logprobs for piece in pieces if piece.token_id is not None]
    told = bool(found) and found[0] is not None
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces if piece.token_id is not None),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(found) if told else None,
    )
