"""One run of a generator for a person at a terminal: prints the answers, then the facts."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from models.text.stop_strings import StopStrings
from models.text.tokenizer import TextStream
from wavejax.cli.compilation import compilation_notices
from wavejax.cli.progress import bytes_text, progress_bar
from wavejax.engine.facts import Facts
from wavejax.engine.generator import NO_TOKEN, Generator


@dataclasses.dataclass
class Answer:
    """One sequence's answer, as far as it has come.

    Attributes:
        prompt: the number of its prompt, from 1.
        sample: the number of its sample of that prompt, from 1.
        prompt_ids: the prompt's tokens.
        stream: turns tokens into text.
        stops: finds the texts that end it.
        text, tokens: what has come.
        reason: why it ended: "stop" after a stop token or text, "length", "interrupted", or
            "not finite"; None while it has not.
    """

    prompt: int
    sample: int
    prompt_ids: list[int]
    stream: TextStream
    stops: StopStrings
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str | None = None

    def take(self, token: int, stop_tokens: Sequence[int]) -> str:
        """Counts in a token; the text to show for it."""
        self.tokens.append(token)
        if token in stop_tokens:
            return self.end("stop")
        piece, found = self.stops.push(self.stream.push(token))
        self.text += piece
        if found:
            self.reason = "stop"
        return piece

    def end(self, reason: str) -> str:
        """Ends the answer, if it has not; the text that was held back."""
        if self.reason is not None:
            return ""
        self.reason = reason
        piece, found = self.stops.push(self.stream.flush())
        if not found:
            piece += self.stops.flush()
        self.text += piece
        return piece

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return {
            "prompt": self.prompt,
            "sample": self.sample,
            "prompt_tokens": len(self.prompt_ids),
            "text": self.text,
            "token_ids": self.tokens,
            "finish_reason": self.reason,
        }


class Run:
    """One generation: its answers while they come, and what it took.

    Args:
        generator: what generates.
        answers: one for each sequence, empty; the samples of a prompt side by side.
        dtype: of weights and caches.
        quiet: print no text.
    """

    def __init__(self, generator: Generator, answers: list[Answer], dtype: str, quiet: bool):
        self.generator, self.answers, self.dtype, self.quiet = generator, answers, dtype, quiet
        self.printed = 0  # answers of a batch printed so far
        self.interrupted: str | None = None  # by what signal
        self.first_token_seconds: float | None = None
        self.tokens_per_second: float | None = None
        self.facts: Facts | None = None

    def generate(self, params: Any, new_tokens: int, seed: int, shown: bool) -> None:
        """Reads the prompts and generates, printing one prompt's text as it comes.

        Raises:
            InputError: the model's logits were not finite; what came before has been printed.
        """
        started = time.perf_counter()
        with compilation_notices("reads the prompt") as notices:
            with progress_bar("reading the prompt, building the index", shown) as report:
                ids = [answer.prompt_ids for answer in self.answers]
                state = self.generator.start(
                    params, ids, new_tokens, seed, progress=report if shown else None
                )
            notices.enter("generates")
            first = ended = None
            for newest, steps in self.generator.stream(params, state, new_tokens):
                state = newest
                ended = time.perf_counter()
                if first is None:
                    first = ended
                    self.first_token_seconds = first - started
                for tokens in steps:
                    self._take(tokens)
                self._count_speed(ended - first)
                self._print_finished()
                if all(answer.reason for answer in self.answers):
                    break
        broken = np.flatnonzero(np.asarray(state.nonfinite)).tolist()
        for index in broken:
            # A text that ended it came before.
            self._show(self.answers[index].end("not finite"))
        self._end("length")
        self.facts = self.generator.facts(state)
        broken = [index for index in broken if self.answers[index].reason == "not finite"]
        if broken:
            raise InputError(self._not_finite(broken[0]))

    def interrupt(self, signal_name: str) -> None:
        """Ends all answers where they are, and prints what there is of them."""
        self.interrupted = signal_name
        self._end("interrupted")

    def _count_speed(self, seconds: float) -> None:
        later = sum(max(0, len(answer.tokens) - 1) for answer in self.answers)
        if later:
            self.tokens_per_second = later / seconds

    def _take(self, tokens: np.ndarray) -> None:
        """Counts in one step's tokens, `[batch]`."""
        for answer, token in zip(self.answers, tokens.tolist(), strict=True):
            if token != NO_TOKEN and answer.reason is None:
                self._show(answer.take(token, self.generator.stop_tokens))

    def _show(self, piece: str) -> None:
        if piece and len(self.answers) == 1 and not self.quiet:
            print(piece, end="", flush=True)

    def _end(self, reason: str) -> None:
        for answer in self.answers:
            self._show(answer.end(reason))
        self._print_finished()

    def _print_finished(self) -> None:
        """Prints a batch's answers, in order, as soon as each and those before it are complete."""
        batch = len(self.answers)
        while not self.quiet and self.printed < batch and self.answers[self.printed].reason:
            answer = self.answers[self.printed]
            if batch > 1:
                print(
                    f"=== {self._name(answer)} ===", answer.text, sep="\n", end="\n\n", flush=True
                )
            elif answer.text or answer.reason in ("stop", "length"):
                print(flush=True)
            self.printed += 1

    def _name(self, answer: Answer) -> str:
        """Which one it is: "prompt 2 of 3, sample 1 of 4", of what there is more than one."""
        last = self.answers[-1]
        parts = [
            f"{what} {number} of {count}"
            for what, number, count in (
                ("prompt", answer.prompt, last.prompt),
                ("sample", answer.sample, last.sample),
            )
            if count > 1
        ]
        return ", ".join(parts)

    def _not_finite(self, index: int) -> str:
        answer = self.answers[index]
        name = self._name(answer)
        where = f"of {name} " if name else ""
        after = f"after {len(answer.tokens)} new tokens" if answer.tokens else "from the start"
        cause = (
            "float16 holds no number above 65504, which the model seems to pass: give --dtype "
            "bfloat16 or float32"
            if self.dtype == "float16"
            else f"the weights hold NaN or infinity, or {self.dtype} overflowed: check the model's "
            "file, or convert the model again"
        )
        return f"the logits {where}are not finite (NaN or infinity) {after}: {cause}"

    def as_json(self, **more: Any) -> dict[str, Any]:
        """What --json prints, `more` first."""
        facts = {} if self.facts is None else dataclasses.asdict(self.facts)
        return {
            **more,
            "interrupted": self.interrupted,
            "answers": [answer.as_json() for answer in self.answers],
            "facts": {
                "first_token_seconds": self.first_token_seconds,
                "tokens_per_second": self.tokens_per_second,
                **facts,
            },
        }

    def facts_line(self, sampling: str | None = None) -> str:
        """The facts of the run, on one line; `sampling` as the model has it, if it was asked."""
        assert self.facts is not None
        assert self.first_token_seconds is not None

        def share(value: float | None) -> str:
            return "none" if value is None else f"{value:.1%}"

        speed, hits = self.tokens_per_second, self.facts.hit_ratio
        exact = not self.facts.indexed_tokens
        retrieved = f"tokens retrieved: {share(self.facts.retrieved_share)}"
        return "; ".join(
            [
                f"first token after {self.first_token_seconds:.2f} s",
                "one token" if speed is None else f"{speed:.1f} tokens/s",
                *([] if sampling is None else [f"sampling as the model has it: {sampling}"]),
                "all tokens are exact" if exact else retrieved,
                *([] if hits is None else [f"cache hits: {share(hits)}"]),
                f"KV cache: {bytes_text(self.facts.device_bytes)} on the device, "
                f"{bytes_text(self.facts.host_bytes)} on the host",
            ]
        )
