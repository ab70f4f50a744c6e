"""Generation: prefill in buckets, a compiled decode step, many steps in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine import compiled, penalties
from wavejax.engine.checks import (
    MOST_INT32,
    as_prompts,
    as_sequences,
    as_stop_tokens,
    as_tokens,
    whole_number,
)
from wavejax.engine.compiled import CompiledEngine
from wavejax.engine.facts import Facts, facts_of
from wavejax.engine.interface import Attention, Engine
from wavejax.engine.modes import own_modes
from wavejax.engine.prefill import read_prompt
from wavejax.engine.prompts import answer_room, bucket
from wavejax.engine.sampling import Sampler, settings_of
from wavejax.engine.staged import StagedEngine
from wavejax.engine.state import NO_TOKEN, DecodeState, commit
from wavejax.engine.state_checks import (
    as_samplers,
    check_draws,
    check_params,
    check_room,
    check_state,
)
from wavejax.store.shape import CacheShape

STREAM_CHUNK = compiled.STEPS_AT_LEAST  # Steps in one call while streaming: seen at once.


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates text with a model, an attention and a sampler.

    Hashable: its compiled programs are kept by JAX and shared by equal generators; those that read
    prompts, by all generators of equal model and attention.

    Its methods compute in JAX's standard modes, whatever modes the caller's program has set.

    Attributes:
        model_config: the model's configuration.
        attention: `WaveAttention` or `DenseAttention`.
        sampler: how a token is drawn; greedy by default.
        stop_tokens: a sequence ends after any of these; any iterable of token ids.
        unroll: write all layers out in the compiled step; None does on GPUs, where it is faster.
            Of no effect with `fetch="staged"`, whose step is a few programs a layer.

    Raises:
        InputError: a part is of another kind, or a stop token is not the model's.
    """

    model_config: ModelConfig
    attention: Attention
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    stop_tokens: tuple[int, ...] = ()
    unroll: bool | None = None

    def __post_init__(self) -> None:
        for name, kinds in (
            ("model_config", (ModelConfig,)),
            ("attention", (WaveAttention, DenseAttention)),
            ("sampler", (Sampler,)),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                wanted = " or a ".join(kind.__name__ for kind in kinds)
                raise InputError(f"{name} is of type {type(value).__name__}; give a {wanted}")
        stops = as_stop_tokens(self.stop_tokens, self.model_config.vocab_size)
        object.__setattr__(self, "stop_tokens", stops)

    @property
    def engine(self) -> Engine:
        """What runs the model, by the attention; may start JAX's device."""
        kind = StagedEngine if self.staged else CompiledEngine
        return kind(self.model_config, self.attention, self.stop_tokens, self.unroll)

    @property
    def staged(self) -> bool:
        """Whether rows are staged; see `wavejax.engine.staged`."""
        return isinstance(self.attention, WaveAttention) and self.attention.staged

    @property
    def unrolls(self) -> bool:
        """See `Engine.unrolls`."""
        return self.engine.unrolls

    def start(
        self,
        params: Params,
        prompts: Iterable[Iterable[int]],
        max_new_tokens: SupportsIndex,
        seed: SupportsIndex = 0,
        progress: Callable[[int, int], None] | None = None,
        sequences: Iterable[int] | None = None,
        samplers: Iterable[Sampler] | None = None,
    ) -> DecodeState:
        """Reads the prompts, one by one, and builds their caches.

        Prompts do not share a program run, so each gets what it would get alone.

        Args:
            params: the model's parameters, their layers stacked or unstacked; so in all methods.
            prompts: token ids, at least one each; any iterable of iterables of whole numbers.
            max_new_tokens: room to generate so many tokens each. It is rounded up
                (`prompts.answer_room`), so that requests of about as many share programs: it is for
                the caller to stop after so many.
            seed: of the sampler, an int32. Seed, a sequence's number and the step fix the noise
                with which a token is drawn: the same seed gives a prompt the same answer in the
                same place of a batch, whatever stands beside it; equal prompts in one batch get
                different ones.
            progress: called with (layers done, layers in all) as the layers of all prompts finish.
            sequences: each prompt's number for its noise, 0 or more; None numbers them 0, 1, 2, ...
                With `sequences=[3]` a prompt gets alone what it gets as the fourth of a batch.
            samplers: how each prompt's tokens are drawn; None: as the generator's `sampler` does.
                Other temperatures, shares and penalties compile nothing anew.

        Raises:
            InputError: before anything is read: there is no prompt, one is empty, a token is not
                the model's, a number is no whole one or out of range, `sequences` or
                `samplers` are not as many as prompts, or the parameters are not the model's.
        """
        prompts = as_prompts(prompts, self.model_config.vocab_size)
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
        numbers = as_sequences(sequences, len(prompts))
        each = as_samplers(samplers, len(prompts), self.sampler)
        check_params(params, self.model_config)
        with own_modes():
            return self._start(params, prompts, new_tokens, seed, progress, numbers, each)

    def _start(
        self,
        params: Params,
        prompts: list[np.ndarray],
        new_tokens: int,
        seed: int,
        progress: Callable[[int, int], None] | None,
        sequences: np.ndarray,
        samplers: list[Sampler],
    ) -> DecodeState:
        batch, vocab = len(prompts), self.model_config.vocab_size
        dtype = params["params"]["embedding"].dtype
        most = max(bucket(len(prompt)) for prompt in prompts), answer_room(new_tokens)
        shape = CacheShape.of(self.model_config)
        empty = self.attention.init_state(shape, batch, *most, dtype)
        empty, logits = commit((empty, jnp.zeros((batch, vocab), jnp.float32)))
        # Memory that is refused shows now, not when all has been read and compiled for nothing.
        jax.block_until_ready(empty)
        engine, layers = self.engine, self.model_config.num_layers
        attention_state = engine.hold(empty)
        for sequence, prompt in enumerate(prompts):
            note = progress and _part_of(progress, sequence * layers, batch * layers)
            attention_state, logits = read_prompt(
                engine, params, prompt, sequence, attention_state, logits, note
            )
        rest = jnp.zeros(batch, bool), jnp.int32(seed), jnp.int32(0), jnp.asarray(sequences)
        settings = settings_of(samplers, vocab, [self.sampler])
        counted = settings.penalties is not None
        counts = penalties.count_prompts(prompts, vocab) if counted else None
        more = {"nonfinite": jnp.zeros(batch, bool), "counts": counts, "sampling": settings}
        return DecodeState(attention_state, logits, *commit(rest), **commit(more))

    def stream(
        self, params: Params, state: DecodeState, max_new_tokens: SupportsIndex
    ) -> Iterator[tuple[DecodeState, Int[np.ndarray, "steps batch"]]]:
        """Generates and yields tokens as they come, one call of the device behind.

        Yields:
            the newest state, and int32 tokens, NO_TOKEN where a sequence has stopped; its stop
            token is the last real one. Ends when all have stopped, or after `max_new_tokens`. A
            state is donated to the next call: only the last one yielded may be used. Its
            `nonfinite` says which sequences ended because their logits were not finite: what they
            yielded before is sound.

        Raises:
            InputError: as `decode_n` does, at the call.
        """
        most = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        check_state(self.engine, self.sampler, state)
        check_draws(self.sampler, state)
        return self._stream(params, state, most)

    def _stream(
        self, params: Params, state: DecodeState, max_new_tokens: int
    ) -> Iterator[tuple[DecodeState, Int[np.ndarray, "steps batch"]]]:
        pending = None
        done = 0
        while done < max_new_tokens:
            # The first token alone, as soon as there is one.
            steps = min(STREAM_CHUNK, max_new_tokens - done) if done else 1
            state, tokens = self.decode_n(params, state, steps)
            done += steps
            if pending is not None:
                seen = jax.device_get(pending)
                yield state, seen
                if _all_stopped(seen[-1], self.stop_tokens):
                    return
            pending = tokens
        if pending is not None:
            yield state, jax.device_get(pending)

    def decode_n(
        self, params: Params, state: DecodeState, steps: SupportsIndex
    ) -> tuple[DecodeState, Int[Array, "steps batch"]]:
        """Generates `steps` tokens a sequence in one compiled call; donates `state`.

        Does not wait for the device, so it raises nothing where logits are not finite: NaN or
        infinity, as of weights too large for float16. Such a sequence ends without a token of them,
        the others go on, and the new state's `nonfinite` says so.

        Returns:
            the new state, and the tokens, NO_TOKEN where a sequence had stopped before: after a
            stop token, where the room that `start` made was full, or where its logits were not
            finite.

        Raises:
            InputError: `steps` is negative or no whole number, or the state is none that this
                generator can go on with: used before, another attention's, or without the counts
                that its penalties need.
        """
        steps = whole_number("steps", steps, 0, MOST_INT32)
        check_state(self.engine, self.sampler, state)
        check_draws(self.sampler, state)
        with own_modes():
            return self.engine.decode_n(params, state, steps)

    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array | np.ndarray, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """Runs given tokens through the decode step (teacher forcing); donates `state`.

        A sequence whose `finished` is set forgets its tokens. Logits are returned as they are:
        without penalties, and finite or not.

        Returns:
            the new state, and the logits from which each of the tokens would have been drawn.

        Raises:
            InputError: the tokens are none of the model's; the state is none to go on with, as of
                `decode_n`; or, where it is not traced, there is no room for so many tokens.
        """
        check_state(self.engine, self.sampler, state)
        batch, vocab = state.finished.shape[0], self.model_config.vocab_size
        with own_modes():
            given = as_tokens(tokens, True, batch, vocab)
            if not isinstance(state.finished, jax.core.Tracer):
                check_room(self.engine, state, given)
            return self.engine.force(params, state, given)

    def feed(
        self, params: Params, state: DecodeState, tokens: Int[Array | np.ndarray, " batch"]
    ) -> DecodeState:
        """Runs one given token of each sequence: a decode step, to be compiled by the caller.

        A sequence whose `finished` is set forgets its token; so should one that has no room left
        (`attention.remaining`), which is for the caller to see. With `fetch="staged"` it compiles
        its programs itself, and cannot be compiled into another.

        Raises:
            InputError: the tokens or the state are none to go on with, as of `force`.
        """
        check_state(self.engine, self.sampler, state)
        with own_modes():
            given = as_tokens(tokens, False, state.finished.shape[0], self.model_config.vocab_size)
            return self.engine.feed(params, state, given)

    def facts(self, state: DecodeState) -> Facts:
        """What the attention retrieved, found cached, and occupies.

        Raises:
            InputError: the state was used before.
        """
        check_state(self.engine, self.sampler, state)
        with own_modes():
            return facts_of(self.attention, state.attention_state)


def _all_stopped(last: np.ndarray, stop_tokens: tuple[int, ...]) -> bool:
    return bool(np.isin(last, (*stop_tokens, NO_TOKEN)).all())


def _part_of(
    progress: Callable[[int, int], None], before: int, total: int
) -> Callable[[int], None]:
    """One prompt's progress as a part of all prompts'."""
    return lambda done: progress(before + done, total)
