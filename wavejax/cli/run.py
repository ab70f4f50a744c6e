"""One run of a generator for a person at a terminal: prints the answers, then the facts."""

import dataclasses
from typing import Any

from models.errors import InputError
from models.parameters import Params
from wavejax.cli.compilation import compilation_notices
from wavejax.cli.progress import bytes_text, progress_bar
from wavejax.engine.facts import Facts
from wavejax.engine.text import Answer, Generation, TextPiece, TextRun


class Run:
    """One generation, printed while it comes.

    Args:
        run: the run, not started.
        dtype: of weights and caches.
        quiet: print no text.
    """

    def __init__(self, run: TextRun, dtype: str, quiet: bool):
        self.run, self.dtype, self.quiet = run, dtype, quiet
        self.printed = 0  # answers of a batch printed so far
        self.interrupted: str | None = None  # by what signal

    @property
    def result(self) -> Generation:
        """The answers as far as they have come, and what they took."""
        return self.run.result()

    def generate(self, params: Params, new_tokens: int, seed: int, shown: bool) -> None:
        """Read the prompts and generate, printing one prompt's text as it comes.

        Raises:
            InputError: the model's logits were not finite; what came before has been printed.
        """
        with compilation_notices("reads the prompt") as notices:
            with progress_bar("reading the prompt, building the index", shown) as report:
                self.run.start(params, new_tokens, seed, report if shown else None)
            notices.enter("generates")
            for piece in self.run.pieces(params, new_tokens):
                self._show(piece)
        broken = [a for a in self.run.answers if a.finish_reason == "not finite"]
        if broken:
            raise InputError(self._not_finite(broken[0]))

    def interrupt(self, signal_name: str) -> None:
        """End all answers where they are, and print what there is of them."""
        self.interrupted = signal_name
        for piece in self.run.end("interrupted"):
            self._show(piece)
        self._print_finished()

    def _show(self, piece: TextPiece) -> None:
        if piece.text and self.run.batch == 1 and not self.quiet:
            print(piece.text, end="", flush=True)
        if piece.finish_reason is not None:
            self._print_finished()

    def _print_finished(self) -> None:
        """Print a batch's answers, in order, as soon as each and those before it are complete."""
        answers = self.run.answers
        batch = len(answers)
        while not self.quiet and self.printed < batch and answers[self.printed].finish_reason:
            answer = answers[self.printed]
            if batch > 1:
                print(
                    f"=== {self._name(answer)} ===", answer.text, sep="\n", end="\n\n", flush=True
                )
            elif answer.text or answer.finish_reason in ("stop", "stop_string", "length"):
                print(flush=True)
            self.printed += 1

    def _name(self, answer: Answer) -> str:
        """Which one it is: "prompt 2 of 3, sample 1 of 4", of what there is more than one."""
        last = self.run.answers[-1]
        parts = [
            f"{what} {number + 1} of {most + 1}"
            for what, number, most in (
                ("prompt", answer.prompt, last.prompt),
                ("sample", answer.sample, last.sample),
            )
            if most
        ]
        return ", ".join(parts)

    def _not_finite(self, answer: Answer) -> str:
        name = self._name(answer)
        where = f"of {name} " if name else ""
        count = len(answer.token_ids)
        after = f"after {count} new tokens" if count else "from the start"
        cause = (
            "float16 holds no number above 65504, which the model seems to pass: give --dtype "
            "bfloat16 or float32"
            if self.dtype == "float16"
            else f"the weights hold NaN or infinity, or {self.dtype} overflowed: check the model's "
            "file, or convert the model again"
        )
        return f"the logits {where}are not finite (NaN or infinity) {after}: {cause}"

    def as_json(self, **more: Any) -> dict[str, Any]:
        """Return what --json prints, `more` first."""
        result = self.result
        facts = {} if result.facts is None else dataclasses.asdict(result.facts)
        return {
            **more,
            "interrupted": self.interrupted,
            "answers": [_answer_json(answer) for answer in result.answers],
            "facts": {
                "first_token_seconds": result.first_token_seconds,
                "tokens_per_second": result.tokens_per_second,
                **facts,
            },
        }

    def facts_line(
        self,
        sampling: str | None = None,
        attention: str | None = None,
        weights: str | None = None,
    ) -> str:
        """Return the facts of the run, on one line.

        Args:
            sampling: what the model has, if it was asked.
            attention: which was taken and why, if the plan chose it.
            weights: what they take, if they are not all of the run's dtype.
        """
        result = self.result
        facts = result.facts
        assert facts is not None
        assert result.first_token_seconds is not None

        def share(value: float | None) -> str:
            return "none" if value is None else f"{value:.1%}"

        speed, hits = result.tokens_per_second, facts.hit_ratio
        exact = "all tokens are read, in int8" if facts.rounded else "all tokens are exact"
        retrieved = f"tokens retrieved: {share(facts.retrieved_share)}"
        return "; ".join(
            [
                f"first token after {result.first_token_seconds:.2f} s",
                "one token" if speed is None else f"{speed:.1f} tokens/s",
                *([] if attention is None else [attention]),
                *([] if sampling is None else [f"sampling as the model has it: {sampling}"]),
                retrieved if facts.indexed_tokens else exact,
                *([] if hits is None else [f"cache hits: {share(hits)}"]),
                *audit_text(facts),
                *tolerance_text(facts),
                *([] if weights is None else [weights]),
                f"KV cache: {bytes_text(facts.device_bytes)} on the device, "
                f"{bytes_text(facts.host_bytes)} on the host",
            ]
        )


def audit_text(facts: Facts) -> list[str]:
    """Say what an audit found; nothing without one."""
    if facts.error_median is None or facts.error_99 is None:
        return []
    return [
        f"true error of {facts.audited} heads: median {facts.error_median:.2%}, "
        f"99 % of them {facts.error_99:.2%} or less"
    ]


def tolerance_text(facts: Facts) -> list[str]:
    """Say how many heads were within the tolerance; nothing without one."""
    if facts.within is None:
        return []
    return [
        f"within the tolerance: {facts.within:.2%} of heads, {facts.more:.2%} after more tokens, "
        f"{facts.computed:.2%} computed exactly"
    ]


def _answer_json(answer: Answer) -> dict[str, Any]:
    """Return what --json prints of an answer: a stop string ends it as a stop token does."""
    reason = answer.finish_reason
    return {
        "prompt": answer.prompt + 1,
        "sample": answer.sample + 1,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": "stop" if reason == "stop_string" else reason,
    }
