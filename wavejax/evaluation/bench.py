"""Runs samples through methods: one dense prefill and answer, then each method's decoding."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine.generator import NO_TOKEN, Generator
from wavejax.engine.prompts import bucket
from wavejax.evaluation.methods import FULL
from wavejax.evaluation.samples import Sample, score
from wavejax.evaluation.shared_prefill import SharedPrefill
from wavejax.evaluation.teacher_forcing import (
    CHUNK,
    Answer,
    Judgement,
    answer,
    bins,
    greedy,
    judge,
    places_of,
    sample_keys,
)


@dataclasses.dataclass(frozen=True)
class Figures:
    """How a method does on one sample.

    Attributes:
        prompt_tokens, answer_tokens: their numbers; the answer is full attention's, or the text's.
        kl: mean over the answer's tokens of KL(full || method), in nats.
        match: share of the answer's tokens at which the method's most probable token is full
            attention's.
        nll: mean over the answer's tokens of -log of their probability, in nats.
        kept: of the reference strings that full attention's answer has, the share whose tokens are
            all the method's most probable ones; None where it has none.
        score: of the method's own greedy answer, the share of the reference strings that it has;
            None where there are none or it was not asked for.
        text: that answer.
        kl_by_chunk: `kl` of each 128 tokens in turn; empty for answers of one.
        clusters: of the method's index, in the mean of layers and kv heads; None without.
    """

    prompt_tokens: int
    answer_tokens: int
    kl: float
    match: float
    nll: float
    kept: float | None
    score: float | None
    text: str | None
    kl_by_chunk: list[float]
    clusters: float | None = None


class Bench:
    """A model, and methods to decode it by.

    Args:
        model, params, tokenizer: the model's.
        methods: attentions by name, full attention under its own.
        stop_tokens: an answer ends after any of these.
        answers: also let every method answer by itself, and score that.
        unroll: see `Generator`; False compiles several times faster.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        methods: Mapping[str, DenseAttention | WaveAttention],
        *,
        stop_tokens: tuple[int, ...] = (),
        answers: bool = True,
        unroll: bool = False,
    ):
        self.params, self.tokenizer, self.answers = params, tokenizer, answers
        self.full = Generator(model, DenseAttention(), stop_tokens=stop_tokens, unroll=unroll)
        self.generators = {
            name: dataclasses.replace(self.full, attention=attention)
            for name, attention in methods.items()
        }

    def run(
        self,
        samples: Sequence[Sample],
        length: int,
        methods: Collection[str],
        *,
        sampled: bool = False,
        seed: int = 0,
        first: int = 0,
    ) -> Iterator[tuple[str, list[Figures]]]:
        """Run a batch of samples of one task.

        Args:
            samples: as many in every call at one length, so that compiled programs are shared.
            length: the most tokens of prompt and answer.
            methods: names of those to run.
            sampled: full attention's answer is drawn at temperature 1.
            seed: of that.
            first: the first sample's number; each is drawn by its own, whatever the others are.

        Yields:
            each method's name and its figures, a sample each, as soon as it is done.
        """
        steps = samples[0].new_tokens
        shared, answers = self.answer(samples, length, sampled=sampled, seed=seed, first=first)
        full = _judge_full(answers)
        scored = self.answers and bool(samples[0].references)
        for name in methods:
            generator = self.generators[name]
            clusters = None
            if name == FULL:
                judged, own = full, _tokens(answers)
            else:
                judged = judge(generator, self.params, shared.state(generator), answers)
                own, clusters = None, shared.clusters(generator)
                if scored:
                    start = shared.state(generator)
                    own = greedy(generator, self.params, start, answers, steps)
            said = _tokens(answers), full, judged, own if scored else None
            yield (
                name,
                [self._figures(sample, i, *said, clusters) for i, sample in enumerate(samples)],
            )

    def answer(
        self,
        samples: Sequence[Sample],
        length: int,
        *,
        sampled: bool = False,
        seed: int = 0,
        first: int = 0,
    ) -> tuple[SharedPrefill, list[Answer]]:
        """Full attention's prefill and answer; see `run`."""
        steps = samples[0].new_tokens
        room, new_tokens = bucket(length), -(-steps // CHUNK) * CHUNK
        prompts = [sample.tokens for sample in samples]
        spare = room - max(bucket(len(prompt)) for prompt in prompts)
        state = self.full.start(self.params, prompts, spare + new_tokens)
        shared = SharedPrefill(state, room, new_tokens)
        forced = None
        if samples[0].continuation:
            forced = np.array([sample.continuation for sample in samples], np.int32).T
        keys = sample_keys(seed, first, len(samples)) if sampled else None
        return shared, answer(self.full, self.params, shared.state(self.full), steps, forced, keys)

    def _figures(
        self,
        sample: Sample,
        i: int,
        answers: np.ndarray,
        full: Judgement,
        judged: Judgement,
        own: np.ndarray | None,
        clusters: np.ndarray | None,
    ) -> Figures:
        said = answers[:, i]
        steps = said != NO_TOKEN
        same = judged.best[:, i] == said
        kept = [same[places].all() for places in self._places(sample, said[steps])]
        text = None if own is None else self._text(own[:, i])
        kl = judged.kl[steps, i]
        return Figures(
            prompt_tokens=len(sample.tokens),
            answer_tokens=int(steps.sum()),
            kl=float(kl.mean()),
            match=float((judged.best == full.best)[steps, i].mean()),
            nll=float(judged.nll[steps, i].mean()),
            kept=float(np.mean(kept)) if kept else None,
            score=None if text is None else score(sample.references, text),
            text=text,
            kl_by_chunk=list(bins(kl, CHUNK)) if len(kl) > CHUNK else [],
            clusters=None if clusters is None else float(clusters[i]),
        )

    def _places(self, sample: Sample, said: np.ndarray) -> list[np.ndarray]:
        """Where the answer spells those of the references that it gives."""
        stream = self.tokenizer.stream()
        pieces = [stream.push(token) for token in said.tolist()]
        found = [places_of(reference, pieces) for reference in sample.references]
        return [places for places in found if places is not None]

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens[tokens != NO_TOKEN].tolist())


def _tokens(answers: list[Answer]) -> np.ndarray:
    return np.concatenate([np.asarray(part.tokens)[: part.steps] for part in answers])


def _judge_full(answers: list[Answer]) -> Judgement:
    """Full attention on its own answer."""
    parts = [jax.tree.map(np.asarray, _full_figures(part.tokens, part.logits)) for part in answers]
    steps = [part.steps for part in answers]
    nll, best = (
        np.concatenate([part[place][:count] for part, count in zip(parts, steps, strict=True)])
        for place in (0, 1)
    )
    return Judgement(np.zeros_like(nll), nll, best)


@jax.jit
def _full_figures(tokens: Any, logits: Any) -> Any:
    log_p = jax.nn.log_softmax(logits)
    of_said = jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return -of_said, jnp.argmax(logits, axis=-1).astype(jnp.int32)
