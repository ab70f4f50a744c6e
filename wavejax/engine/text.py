"""Text from a generator: answers piece by piece while they come, and as they ended."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from models.parameters import Params
from models.text.stop_strings import StopStrings
from models.text.tokenizer import Tokenizer
from wavejax.engine.facts import Facts
from wavejax.engine.generator import NO_TOKEN, DecodeState, Generator
from wavejax.engine.prompt_text import EncodedPrompt

FinishReason = Literal["stop", "stop_string", "length", "not finite", "interrupted"]
"""Why an answer ended.

"stop": after a stop token. "stop_string": before a text that was to end it. "length": after
`max_new_tokens`. "not finite": NaN or infinity was among its logits. "interrupted": its reader
ended it.
"""


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """One step of one answer, as `LanguageModel.stream` yields it.

    Attributes:
        answer: the number of the answer in the batch, from 0.
        token_id: the token; None for text that was held back until the answer ended.
        text: the text that the token completes: "" while a character lacks bytes, while a stop
            string may have begun, and for special tokens.
        finish_reason: why the answer ended with this piece; None while it has not.
    """

    answer: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sequence's answer.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        token_ids: all tokens, a stop token at the end included.
        prompt_tokens: tokens of its prompt.
        finish_reason: see `FinishReason`; None while it has not ended.
        prompt: the number of its prompt in the batch, from 0.
        sample: the number of its sample of that prompt, from 0.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None
    prompt: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answers of one run, and what it took.

    `text`, `token_ids`, `prompt_tokens` and `finish_reason` are those of the first answer: of the
    only one, where one prompt was given.

    Attributes:
        answers: one a prompt and sample; the samples of a prompt side by side.
        facts: what the attention retrieved, found cached, and occupies; None before the end.
        first_token_seconds: from the start of the prompts' reading, compilation included, to the
            first token; None before it.
        tokens_per_second: of all answers together, after the first token; None where there is
            none.
    """

    answers: tuple[Answer, ...]
    facts: Facts | None
    first_token_seconds: float | None
    tokens_per_second: float | None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's tokens."""
        return self.answers[0].token_ids

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the first answer's prompt has."""
        return self.answers[0].prompt_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first answer ended."""
        return self.answers[0].finish_reason


class TokenDecoder:
    """Tokens to text up to a stop string, both cut as they come.

    Args:
        tokenizer: the model's.
        prompt: what the tokens answer, or continue.
        stop: the stop strings; none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: EncodedPrompt, stop: Sequence[str]):
        # A text is continued; a message is answered, by a text that begins anew.
        self._stream = tokenizer.stream(prompt.ids if prompt.raw else ())
        self._stops = StopStrings(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text to show for a token, and whether a stop string has ended it."""
        return self._stops.push(self._stream.push(token))

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        text, found = self._stops.push(self._stream.flush())
        return text if found else text + self._stops.flush()


@dataclasses.dataclass
class _Growing:
    """An answer while it comes."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    decoder: TokenDecoder
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None

    def frozen(self) -> Answer:
        """As it is now."""
        return Answer(
            self.text,
            tuple(self.token_ids),
            len(self.prompt_ids),
            self.reason,
            self.prompt,
            self.sample,
        )


class TextRun:
    """One run of a generator: its answers while they come, and what it took.

    `start` reads the prompts, `pieces` generates; `result` may be asked for at any time.

    Args:
        generator: what generates.
        tokenizer: the model's.
        prompts: what to answer.
        samples: answers of each prompt, side by side in one batch.
        stop: texts that end an answer before they begin.
        read: reads the prompts, as `Generator.start`, which does it unless given.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompts: Sequence[EncodedPrompt],
        samples: int = 1,
        stop: Sequence[str] = (),
        read: Callable[..., DecodeState] | None = None,
    ):
        self.generator, self._read = generator, read or generator.start
        self._answers = [
            _Growing(number, sample, prompt.ids, TokenDecoder(tokenizer, prompt, stop))
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        self._state: DecodeState | None = None
        self._started = 0.0
        self._facts: Facts | None = None
        self._first_token_seconds: float | None = None
        self._tokens_per_second: float | None = None

    @property
    def batch(self) -> int:
        """How many answers come."""
        return len(self._answers)

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answers as far as they have come."""
        return tuple(answer.frozen() for answer in self._answers)

    def result(self) -> Generation:
        """Return what there is: the answers as far as they have come, and what they took."""
        times = self._first_token_seconds, self._tokens_per_second
        return Generation(self.answers, self._facts, *times)

    def start(
        self,
        params: Params,
        max_new_tokens: int,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the prompts; arguments and errors as of `Generator.start`."""
        self._started = time.perf_counter()
        ids = [answer.prompt_ids for answer in self._answers]
        self._state = self._read(params, ids, max_new_tokens, seed, progress=progress)

    def pieces(self, params: Params, max_new_tokens: int) -> Iterator[TextPiece]:
        """Generate, after `start`; yield a piece for each token of each answer as it comes.

        The last piece of an answer has its finish reason. All answers have ended at the end.
        """
        state, first = self._state, 0.0
        for newest, steps in self.generator.stream(params, state, max_new_tokens):  # type: ignore[arg-type]
            state = self._state = newest
            now = time.perf_counter()
            if self._first_token_seconds is None:
                first, self._first_token_seconds = now, now - self._started
            for tokens in steps:
                for number, token in enumerate(tokens.tolist()):
                    if token != NO_TOKEN and self._answers[number].reason is None:
                        yield self._take(number, token)
            later = sum(max(0, len(answer.token_ids) - 1) for answer in self._answers)
            if later:
                self._tokens_per_second = later / (now - first)
            if all(answer.reason for answer in self._answers):
                break
        # A text that ended an answer came before numbers that were not finite.
        for number in np.flatnonzero(np.asarray(state.nonfinite)).tolist():  # type: ignore[union-attr]
            yield from self._end(number, "not finite")
        yield from self.end("length")
        self._facts = self.generator.facts(state)  # type: ignore[arg-type]

    def end(self, reason: FinishReason) -> Iterator[TextPiece]:
        """End all answers that have not ended; yield what was held back of each."""
        for number in range(len(self._answers)):
            yield from self._end(number, reason)

    def _take(self, number: int, token: int) -> TextPiece:
        answer = self._answers[number]
        answer.token_ids.append(token)
        if token in self.generator.stop_tokens:
            text, answer.reason = answer.decoder.flush(), "stop"
        else:
            text, found = answer.decoder.push(token)
            answer.reason = "stop_string" if found else None
        answer.text += text
        return TextPiece(number, token, text, answer.reason)

    def _end(self, number: int, reason: FinishReason) -> Iterator[TextPiece]:
        answer = self._answers[number]
        if answer.reason is None:
            answer.reason, text = reason, answer.decoder.flush()
            answer.text += text
            yield TextPiece(number, None, text, reason)


class TextStream(Iterator[TextPiece]):
    """Pieces of answers as they come; see `LanguageModel.stream`."""

    def __init__(self, run: TextRun, pieces: Iterator[TextPiece]):
        self._run, self._pieces = run, pieces

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def result(self) -> Generation:
        """Return the answers as far as they have come, whole once the pieces have ended."""
        return self._run.result()
