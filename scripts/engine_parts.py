"""The parts of `bench_engine.py`: the batch engine's work, beside what it replaces."""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import wavejax
from models.parameters import Params
from wavejax import Generator
from wavejax.engine.batching import BatchEngine, Event, Piece, Request, Room
from wavejax.engine.batching.options import EngineOptions

STEPS = 8  # of a call of the step, here and there
PER_SLOT = 8  # answers of unequal length
QUESTIONS = 9  # to a text that a slot holds, whose median is taken


@dataclass(frozen=True)
class Setting:
    """What all parts share.

    Attributes:
        generator, params: what generates, greedily and without stop tokens.
        prompt_tokens: of each prompt.
        long_tokens: of the long one.
        new_tokens: the most of an answer.
        slots: answers side by side.
        max_stall_ms: as of `BatchEngine`.
        seed: of the prompts.
    """

    generator: Generator
    params: Params
    prompt_tokens: int
    long_tokens: int
    new_tokens: int
    slots: int
    max_stall_ms: float
    seed: int = 0

    def prompts(self, count: int, tokens: int | None = None) -> list[np.ndarray]:
        """Random prompts, no two alike."""
        rng = np.random.default_rng(self.seed)
        shape = count, self.prompt_tokens if tokens is None else tokens
        return list(rng.integers(0, self.generator.model_config.vocab_size, shape, np.int32))

    @contextmanager
    def engine(self, tokens: int, slots: int, reuse_slots: bool = False) -> Iterator[BatchEngine]:
        """Give an engine that is warm; closed afterwards, which frees its states."""
        room = Room(tokens, self.new_tokens, slots)
        options: EngineOptions = {
            "steps": STEPS,
            "max_stall_ms": self.max_stall_ms,
            "reuse_slots": reuse_slots,
        }
        engine = BatchEngine(self.generator, self.params, [room], **options)
        engine.warmup(prompt_tokens=sorted({tokens, min(tokens, self.prompt_tokens)}))
        try:
            yield engine
        finally:
            engine.close()
            gc.collect()


class Times:
    """When the tokens of one request came."""

    def __init__(self, engine: BatchEngine, request: Request):
        self.sent, self.tokens = time.perf_counter(), list[float]()
        self.error: BaseException | None = None
        self.handle = engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.error = event.error
            if event.token_id is not None:
                self.tokens.append(time.perf_counter())


def run(engine: BatchEngine, *requests: Times) -> None:
    """Do all the work there is, in this thread; raise what ended a request."""
    while engine.turn():
        pass
    for one in requests:
        if one.error is not None:
            raise one.error


def busy(setting: Setting) -> dict[str, float]:
    """Tokens a second with all slots busy, over those of `decode_n` alone."""
    prompts, new = setting.prompts(1) * setting.slots, setting.new_tokens
    with setting.engine(setting.prompt_tokens, setting.slots) as engine:
        seen = [Times(engine, Request(one, new, stop_tokens=())) for one in prompts]
        run(engine, *seen)
    begun, ended = max(one.tokens[0] for one in seen), min(one.tokens[-1] for one in seen)
    if begun >= ended:
        raise ValueError("no time was all slots' own: give more --new-tokens, or shorter prompts")
    within = sum(begun < at <= ended for one in seen for at in one.tokens)
    state = setting.generator.start(setting.params, prompts, new)
    state, _ = setting.generator.decode_n(setting.params, state, STEPS)
    jax.block_until_ready(state.logits)
    start, calls = time.perf_counter(), max(1, new // STEPS - 1)
    for _ in range(calls):
        state, tokens = setting.generator.decode_n(setting.params, state, STEPS)
    jax.block_until_ready(tokens)
    alone = setting.slots * STEPS * calls / (time.perf_counter() - start)
    rate = within / (ended - begun)
    return {"engine_tokens_per_s": rate, "decode_n_tokens_per_s": alone, "ratio": rate / alone}


def unequal(setting: Setting) -> dict[str, float]:
    """Seconds of static batches over the engine's, for answers of unequal length."""
    count = PER_SLOT * setting.slots
    prompts, rng = setting.prompts(count), np.random.default_rng(setting.seed + 1)
    low = np.log(max(1, setting.new_tokens // 32))
    lengths = np.exp(rng.uniform(low, np.log(setting.new_tokens), count)).round().astype(int)
    with setting.engine(setting.prompt_tokens, setting.slots) as engine:
        start = time.perf_counter()
        seen = [
            Times(engine, Request(prompt, int(length), stop_tokens=()))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        run(engine, *seen)
        engine_seconds = max(one.tokens[-1] for one in seen) - start
    _static(setting, prompts[: setting.slots], [STEPS])  # compiles
    start = time.perf_counter()
    for first in range(0, count, setting.slots):
        part = slice(first, first + setting.slots)
        _static(setting, prompts[part], lengths[part].tolist())
    static_seconds = time.perf_counter() - start
    return {
        "tokens": int(lengths.sum()),
        "engine_s": engine_seconds,
        "static_s": static_seconds,
        "ratio": static_seconds / engine_seconds,
    }


def _static(setting: Setting, prompts: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
    """Answer prompts that begin and end together."""
    state = setting.generator.start(setting.params, prompts, setting.new_tokens)
    for _ in range(-(-max(lengths) // STEPS)):
        state, tokens = setting.generator.decode_n(setting.params, state, STEPS)
    jax.block_until_ready(tokens)


def stall(setting: Setting) -> dict[str, float]:
    """Longest gap between an answer's tokens while a long prompt is read."""
    [prompt], [long] = setting.prompts(1), setting.prompts(1, setting.long_tokens)
    with setting.engine(setting.long_tokens, 2) as engine:
        running = Times(engine, Request(prompt, setting.new_tokens, stop_tokens=()))
        while not running.tokens and running.error is None:
            engine.turn()
        late = Times(engine, Request(long, 1, stop_tokens=()))
        run(engine, running, late)
    during = [at for at in running.tokens if late.sent <= at <= late.tokens[0]]
    gaps = np.diff(during)
    longest = float(gaps.max(initial=0.0)) * 1000
    return {
        "max_stall_ms": setting.max_stall_ms,
        "longest_gap_ms": longest,
        "ratio": longest / setting.max_stall_ms,
        "gaps": len(gaps),
        "long_first_token_s": late.tokens[0] - late.sent,
    }


def document(setting: Setting) -> dict[str, float]:
    """Seconds to the first token of a text with a question: read anew, kept, and in its slot."""
    generator, params = setting.generator, setting.params
    [text], [question] = setting.prompts(1), setting.prompts(1, 32)
    asked = np.concatenate([text, question])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kept")
        state = generator.start(params, [text], 1)
        start = time.perf_counter()
        wavejax.save_document(state, path, token_ids=text, generator=generator, params=params)
        saved = time.perf_counter() - start
        del state
        with setting.engine(len(asked), 1) as engine:
            read, again, kept = [], [], []
            for _ in range(2):  # the first compiles
                fresh = Times(engine, Request(asked, 1, stop_tokens=()))
                run(engine, fresh)
                start = time.perf_counter()
                known = wavejax.load_document(path, generator=generator, params=params)
                first = Times(engine, Request(asked, 1, stop_tokens=(), kept=known))
                run(engine, first)
                time.sleep(0.1)
                second = Times(engine, Request(asked, 1, stop_tokens=(), kept=known))
                run(engine, second)
                read.append(fresh.tokens[0] - fresh.sent)
                again.append(first.tokens[0] - start)
                kept.append(second.tokens[0] - second.sent)
    in_slot = []
    with setting.engine(len(asked), 1, reuse_slots=True) as engine:
        # The first reads the text, the second compiles. Of two tokens the first one waits for
        # nothing that an answer's end asks for.
        for new in setting.prompts(2 + QUESTIONS, 32):
            time.sleep(0.1)  # nobody asks while the step after the last answer runs
            asking = Times(engine, Request(np.concatenate([text, new]), 2, stop_tokens=()))
            run(engine, asking)
            in_slot.append(asking.tokens[0] - asking.sent)
    return {
        "read_s": read[-1],
        "loaded_s": again[-1],
        "kept_s": kept[-1],
        "in_slot_s": statistics.median(in_slot[2:]),
        "save_s": saved,
        "ratio": statistics.median(in_slot[2:]) / read[-1],
    }
