"""One run of a generator for a person at a terminal: prints the answers, then the facts."""

import dataclasses
import time
from typing import Any

import numpy as np

from models.tokenizer import Tokenizer
from wavejax.cli_support import bytes_text, progress_bar
from wavejax.facts import Facts
from wavejax.generator import NO_TOKEN, Generator


class Run:
    """One generation: its texts while they come, and what it took."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, batch: int, quiet: bool):
        self.generator, self.tokenizer, self.quiet = generator, tokenizer, quiet
        self.streams = [tokenizer.stream() for _ in range(batch)]
        self.texts = [""] * batch
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.stopped = [False] * batch
        self.printed = 0  # answers of a batch printed so far
        self.first_token_seconds = 0.0
        self.tokens_per_second: float | None = None
        self.facts: Facts | None = None

    def generate(
        self, params: Any, ids: list[list[int]], new_tokens: int, seed: int, shown: bool
    ) -> None:
        """Reads the prompts and generates, printing one prompt's text as it comes."""
        started = time.perf_counter()
        with progress_bar("reading the prompt, building the index", shown) as report:
            state = self.generator.start(
                params, ids, new_tokens, seed, progress=report if shown else None
            )
        first = None
        for newest, steps in self.generator.stream(params, state, new_tokens):
            state = newest
            if first is None:
                first = time.perf_counter()
            for tokens in steps:
                self._take(tokens)
            self._print_finished()
        ended = time.perf_counter()
        for sequence in range(len(ids)):
            self._finish(sequence)
        self._print_finished()
        assert first is not None  # max_new_tokens is at least 1
        self.first_token_seconds = first - started
        later = sum(map(len, self.tokens)) - len(ids)
        if later:
            self.tokens_per_second = later / (ended - first)
        self.facts = self.generator.facts(state)

    def _take(self, tokens: np.ndarray) -> None:
        """Counts in one step's tokens, `[batch]`."""
        for sequence, token in enumerate(tokens.tolist()):
            if token == NO_TOKEN or self.stopped[sequence]:
                continue
            self.tokens[sequence].append(token)
            if token in self.generator.stop_tokens:
                self._finish(sequence)
                continue
            self._write(sequence, self.streams[sequence].push(token))

    def _finish(self, sequence: int) -> None:
        if not self.stopped[sequence]:
            self.stopped[sequence] = True
            self._write(sequence, self.streams[sequence].flush())

    def _write(self, sequence: int, piece: str) -> None:
        self.texts[sequence] += piece
        if len(self.texts) == 1 and not self.quiet:
            print(piece, end="", flush=True)

    def _print_finished(self) -> None:
        """Prints a batch's answers, in order, as soon as each and those before it are complete."""
        batch = len(self.texts)
        while not self.quiet and self.printed < batch and self.stopped[self.printed]:
            if batch == 1:
                print(flush=True)
            else:
                header = f"=== prompt {self.printed + 1} of {batch} ==="
                print(header, self.texts[self.printed], sep="\n", end="\n\n", flush=True)
            self.printed += 1

    def as_json(self, model: str, attention: str, ids: list[list[int]]) -> dict[str, Any]:
        """What --json prints."""
        assert self.facts is not None
        stops = self.generator.stop_tokens
        return {
            "model": model,
            "attention": attention,
            "answers": [
                {
                    "prompt_tokens": len(prompt),
                    "text": text,
                    "token_ids": tokens,
                    "finish_reason": "stop" if tokens[-1] in stops else "length",
                }
                for prompt, text, tokens in zip(ids, self.texts, self.tokens, strict=True)
            ],
            "facts": {
                "first_token_seconds": self.first_token_seconds,
                "tokens_per_second": self.tokens_per_second,
                **dataclasses.asdict(self.facts),
            },
        }

    def facts_line(self) -> str:
        """The facts of the run, on one line."""
        assert self.facts is not None

        def share(value: float | None) -> str:
            return "none" if value is None else f"{value:.1%}"

        speed, hits = self.tokens_per_second, self.facts.hit_ratio
        cache = [] if hits is None else [f"cache hits: {share(hits)}"]
        return "; ".join(
            [
                f"first token after {self.first_token_seconds:.2f} s",
                "one token" if speed is None else f"{speed:.1f} tokens/s",
                f"tokens retrieved: {share(self.facts.retrieved_share)}",
                *cache,
                f"KV cache: {bytes_text(self.facts.device_bytes)} on the device, "
                f"{bytes_text(self.facts.host_bytes)} on the host",
            ]
        )
