"""The model that a server serves, its engine, and what requests may ask of them."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from models.errors import InputError
from models.text.tokenizer import Tokenizer
from wavejax.documents.shelf import Shelf
from wavejax.engine.batching import Event, Handle, Kept, Request, Room, Stats
from wavejax.engine.checks import MOST_INT32
from wavejax.engine.prompt_text import EncodedPrompt, encode_prompt
from wavejax.engine.sampling import Sampler
from wavejax.server.errors import ApiError
from wavejax.server.schemas import Body, Sampling
from wavejax.server.thoughts import BEGIN, has_thoughts

_LAST_TOKENS = 32  # Of a prompt: enough to see whether it ends with a mark.


@runtime_checkable
class Engine(Protocol):
    """What a server uses of `wavejax.engine.batching.BatchEngine`."""

    rooms: Sequence[Room]

    @property
    def alive(self) -> bool:
        """Whether it runs and has not failed."""

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Take a request; its events come in the engine's thread."""

    def stats(self) -> Stats:
        """Tell what it has done, and does."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        request_bytes: of a body.
        request_seconds: from its submission to its end; then it is cancelled.
        body_seconds: for a body to arrive.
        send_seconds: for a client to take a part of a stream.
        new_tokens: of an answer; so many where a request does not say.
    """

    request_bytes: int = 32 * 2**20
    request_seconds: float = 1800.0
    body_seconds: float = 60.0
    send_seconds: float = 60.0
    new_tokens: int = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """A model behind an API.

    Attributes:
        name: of the model, as requests give it.
        tokenizer: the model's.
        engine: which answers.
        context: most tokens, prompt and answer.
        vocab: how many tokens the model has.
        stop_tokens: which end an answer.
        sampler: how tokens are drawn where a request does not say.
        limits: of a request.
        shelf: kept documents; None: there are none.
        tolerance: of requests that give none; 0 where the engine has none to give.
        created: when it was made, seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine
    context: int
    vocab: int
    stop_tokens: tuple[int, ...]
    sampler: Sampler = dataclasses.field(default_factory=lambda: Sampler(temperature=1.0))
    limits: Limits = dataclasses.field(default_factory=Limits)
    shelf: Shelf | None = None
    tolerance: float = 0.0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def check_model(self, body: Body) -> None:
        """Raise ApiError: a body asks for another model, or for what there is not."""
        if body.model is not None and body.model != self.name:
            self.unknown_model(body.model)
        body.refuse_others()

    def unknown_model(self, name: str) -> None:
        """Raise ApiError unless it is this model's name."""
        if name != self.name:
            message = f"there is no model {name!r} here: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_args: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation; long ones take time, so not in the event loop.

        Args:
            messages: oldest first.
            template_args: variables of the chat template.
            tools: functions that the model may call.

        Raises:
            InputError: the model cannot answer these.
        """
        given = known_roles(messages)
        return encode_prompt(self.tokenizer, given, template_args=template_args or {}, tools=tools)

    def encode_text(self, text: str, add_special: bool = True) -> EncodedPrompt:
        """Encode a text that is to be continued."""
        return EncodedPrompt(self.tokenizer.encode(text, add_special=add_special), True)

    def thoughts_begun(self, prompt: Sequence[int] | np.ndarray) -> bool | None:
        """Whether a prompt ends where thoughts have begun; None for a model that does not think."""
        if not has_thoughts(self.tokenizer.chat_template):
            return None
        last = [int(token) for token in prompt[-_LAST_TOKENS:]]
        text = self.tokenizer.backend.decode(last, skip_special_tokens=False)
        return text.rstrip().endswith(BEGIN)

    def kept(self, prompt: EncodedPrompt, asked: int | None) -> Kept | None:
        """Find a document that a prompt begins with, if an answer of so many tokens fits then."""
        if self.shelf is None:
            return None
        found = self.shelf.best(prompt.ids)
        return found if found and self._room(prompt, found) >= (asked or 1) else None

    def new_tokens(
        self,
        prompt: EncodedPrompt,
        asked: int | None,
        param: str,
        whose: str,
        kept: Kept | None = None,
    ) -> int:
        """How many tokens an answer may have.

        Args:
            prompt: which it answers.
            asked: by the request; None: as many as there is room for, to `limits.new_tokens`.
            param: the field that asks.
            whose: the field that has the prompt.
            kept: what the prompt begins with.

        Raises:
            ApiError: there is no room for so much, with both numbers. Nothing is cut.
        """
        prompt_tokens = len(prompt.ids)
        left = self.context - prompt_tokens
        most = self._room(prompt, kept)
        if most < 1 <= left and kept is not None:
            rest = prompt_tokens - kept.reused(prompt.ids)
            message = (
                f"the prompt has {rest} tokens besides the document's, and there is room for "
                f"{most + rest} with the answer's: shorten it"
            )
            raise ApiError(400, message, param=whose, code="context_length_exceeded")
        if asked is None:
            asked = max(1, min(left, most))
        if asked > left:
            message = (
                f"the prompt has {prompt_tokens} tokens, {prompt_tokens + asked} with {asked} new "
                f"ones, and the context is {self.context} tokens: shorten the prompt or lower "
                f"`{param}`"
            )
            raise ApiError(400, message, param=whose, code="context_length_exceeded")
        if asked > most:
            message = (
                f"`{param}` is {asked}, and an answer to a prompt of {prompt_tokens} tokens has "
                f"{most} tokens at most: lower it"
            )
            raise ApiError(400, message, param=param, code="max_tokens_exceeded")
        return asked

    def _room(self, prompt: EncodedPrompt, kept: Kept | None) -> int:
        """Count the new tokens that the engine has room for, up to the limit of an answer."""
        begun, more = (len(prompt.ids), 0) if kept is None else kept.room_of(prompt.ids)
        rooms = [room.new_tokens for room in self.engine.rooms if room.holds(begun, 1)]
        return min(self.limits.new_tokens, max(rooms, default=self.limits.new_tokens) - more)

    def requests(
        self,
        body: Sampling,
        prompt: EncodedPrompt,
        new_tokens: int,
        logprobs: int | None,
        kept: Kept | None = None,
    ) -> list[Request]:
        """Return what the engine is asked for: `n` answers to one prompt.

        Args:
            body: how tokens are drawn.
            prompt: which is answered.
            new_tokens: the most of an answer.
            logprobs: how many of the most probable tokens to tell of; None for none.
            kept: what the prompt begins with.

        Raises:
            ApiError: several answers would all be the same, or there is no tolerance to change.
            InputError: a number is out of range.
        """
        if not prompt.ids:
            raise InputError("the prompt is empty: the model has no tokens for its text")
        sampler = self._sampler(body)
        if body.n > 1 and sampler.greedy:
            message = (
                f"`n` is {body.n}, and `temperature` 0 would give the same answer each time: give "
                "a temperature above 0"
            )
            raise ApiError(400, message, param="n")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if not all(stop):
            raise ApiError(400, "`stop` has an empty text, which every text holds", param="stop")
        if body.tolerance is not None and not self.tolerance:
            message = "this server has no tolerance: start it with `--tolerance`, or leave it out"
            raise ApiError(400, message, param="tolerance", code="unsupported_parameter")
        one = Request(
            prompt=prompt.ids,
            max_new_tokens=new_tokens,
            sampler=sampler,
            seed=_seed(body.seed),
            stop_tokens=self._stop_tokens(body),
            stop=stop,
            logprobs=logprobs,
            raw=prompt.raw,
            kept=kept,
            tolerance=body.tolerance,
        )
        return [dataclasses.replace(one, sequence=number) for number in range(body.n)]

    def _sampler(self, body: Sampling) -> Sampler:
        names = [field.name for field in dataclasses.fields(Sampler)]
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        if given.get("top_k") == -1:  # as vLLM says "all"
            given["top_k"] = 0
        for name, value in given.items():
            try:
                Sampler(**{name: value})
            except InputError as error:
                raise ApiError(400, str(error), param=name) from error
        return dataclasses.replace(self.sampler, **given)

    def _stop_tokens(self, body: Sampling) -> tuple[int, ...] | None:
        """Tokens that end an answer; None: the model's."""
        own = tuple(body.stop_token_ids or ())
        wrong = [token for token in own if token >= self.vocab]
        if wrong:
            message = (
                f"`stop_token_ids` has {wrong[0]}; the model's tokens are 0 to {self.vocab - 1}"
            )
            raise ApiError(400, message, param="stop_token_ids")
        if body.ignore_eos:
            return own
        return tuple(sorted({*self.stop_tokens, *own})) if own else None


def known_roles(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rename OpenAI's newer name of a system message, which templates do not know."""
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]


def _seed(given: int | None) -> int:
    if given is None:
        return secrets.randbelow(MOST_INT32)
    if not -MOST_INT32 - 1 <= given <= MOST_INT32:
        message = f"`seed` is {given}; it must be from {-MOST_INT32 - 1} to {MOST_INT32}"
        raise ApiError(400, message, param="seed")
    return given
