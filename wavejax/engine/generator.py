"""Generation: prefill in buckets, a compiled decode step, many steps in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models import unstacked
from models.errors import InputError
from models.parameters import Params
from wavejax.attention.wave import WaveAttention
from wavejax.engine import compiled, penalties, staged
from wavejax.engine.checks import (
    MOST_INT32,
    as_prompts,
    as_sequences,
    as_tokens,
    check_range,
    whole_number,
)
from wavejax.engine.compiled import NO_TOKEN, DecodeState, Parts
from wavejax.engine.facts import Facts, facts_of
from wavejax.engine.modes import own_modes
from wavejax.engine.prompts import answer_room, bucket
from wavejax.engine.state_checks import check_params, check_state
from wavejax.store.shape import CacheShape

STREAM_CHUNK = 8  # Steps in one call while streaming: what a reader sees at once.


@dataclasses.dataclass(frozen=True)
class Generator(Parts):
    """Generates text with a model, an attention and a sampler.

    Hashable: its compiled programs are kept by JAX and shared by equal generators; those that read
    prompts, by all generators of equal model and attention.

    Its methods compute in JAX's standard modes, whatever modes the caller's program has set.

    Attributes:
        model: the model's configuration.
        attention: `WaveAttention` or `DenseAttention`.
        sampler: how a token is drawn; greedy by default.
        stop_tokens: a sequence ends after any of these; any iterable of token ids.
        unroll: write all layers out in the compiled step; None does on GPUs, where it is faster.
            Of no effect with `fetch="staged"`, whose step is a few programs a layer.

    Raises:
        InputError: a part is of another kind, or a stop token is not the model's.
    """

    @property
    def staged(self) -> bool:
        """Whether rows are staged; see `wavejax.engine.staged`."""
        return isinstance(self.attention, WaveAttention) and self.attention.staged

    def start(
        self,
        params: Params,
        prompts: Iterable[Iterable[int]],
        max_new_tokens: SupportsIndex,
        seed: SupportsIndex = 0,
        progress: Callable[[int, int], None] | None = None,
        sequences: Iterable[int] | None = None,
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

        Raises:
            InputError: before anything is read: there is no prompt, one is empty, a token is not
                the model's, a number is no whole one or out of range, `sequences` are not as many
                as prompts, or the parameters are not the model's.
        """
        prompts = as_prompts(prompts, self.model.vocab_size)
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
        numbers = as_sequences(sequences, len(prompts))
        check_params(params, self.model)
        with own_modes():
            return self._start(params, prompts, new_tokens, seed, progress, numbers)

    def _start(
        self,
        params: Params,
        prompts: list[np.ndarray],
        new_tokens: int,
        seed: int,
        progress: Callable[[int, int], None] | None,
        sequences: np.ndarray,
    ) -> DecodeState:
        batch, vocab = len(prompts), self.model.vocab_size
        dtype = params["params"]["embedding"].dtype
        rooms = [bucket(len(prompt)) for prompt in prompts]
        most = max(rooms), answer_room(new_tokens)
        cache: Any = self.attention.init_state(CacheShape.of(self.model), batch, *most, dtype)
        cache, logits = compiled.commit((cache, jnp.zeros((batch, vocab), jnp.float32)))
        # Memory that is refused shows now, not when all has been read and compiled for nothing.
        jax.block_until_ready(cache)
        by: Any = compiled
        if isinstance(self.attention, WaveAttention) and self.attention.staged:
            by, cache = staged, staged.hold_rows(self.attention, cache)
        layers, done = self.model.num_layers, 0
        ends = unstacked.without_layers(params)
        for sequence, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            padded = np.zeros((1, room), np.int32)
            padded[0, : len(prompt)] = prompt
            length = jnp.int32(len(prompt))
            hidden = compiled.commit(compiled.embed(self.model, ends, jnp.asarray(padded)))
            for layer in range(layers):
                previous = hidden
                hidden, cache = by.prefill_layer(
                    self.model,
                    self.attention,
                    unstacked.only_layer(params, layer),
                    hidden,
                    jnp.int32(layer),
                    jnp.int32(sequence),
                    length,
                    cache,
                )
                if progress is not None and layer > 0:
                    # One layer behind, so that the device always has the next one queued.
                    previous.block_until_ready()
                    done += 1
                    progress(done, batch * layers)
            cache, logits = by.finish_prefill(
                self.model,
                self.attention,
                ends,
                hidden,
                jnp.int32(sequence),
                length,
                cache,
                logits,
            )
            if progress is not None:
                logits.block_until_ready()
                done += 1
                progress(done, batch * layers)
        rest = jnp.zeros(batch, bool), jnp.int32(seed), jnp.int32(0), jnp.asarray(sequences)
        counts = penalties.count_prompts(prompts, vocab) if self.sampler.penalises else None
        more = {"nonfinite": jnp.zeros(batch, bool), "counts": counts}
        return DecodeState(cache, logits, *compiled.commit(rest), **compiled.commit(more))

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
        check_state(self, state)
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
        check_state(self, state)
        with own_modes():
            if self.staged:
                return staged.decode_n(self, params, state, steps)
            # The room is a power of two, so that a remainder of steps needs no program of its own.
            room = max(STREAM_CHUNK, 2 ** (steps - 1).bit_length())
            state, tokens = compiled.decode_n(self, params, state, jnp.int32(steps), room)
            return state, tokens[:steps]

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
        check_state(self, state)
        batch, vocab = state.finished.shape[0], self.model.vocab_size
        with own_modes():
            given = as_tokens(tokens, True, batch, vocab)
            if not isinstance(state.finished, jax.core.Tracer):
                self._check_room(state, given)
            run = staged.force if self.staged else compiled.force
            return run(self, params, state, given)

    def _check_room(self, state: DecodeState, tokens: Array) -> None:
        going = ~np.asarray(state.finished)
        left = np.asarray(self.attention.remaining(staged.wave_of(state.cache)))[going]
        if left.size and len(tokens) > left.min():
            raise InputError(
                f"{len(tokens)} tokens are more than there is room for, {left.min()}: give "
                "`start` a larger max_new_tokens"
            )
        if not isinstance(tokens, jax.core.Tracer):
            check_range(np.asarray(tokens)[:, going], self.model.vocab_size)

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
        check_state(self, state)
        with own_modes():
            given = as_tokens(tokens, False, state.finished.shape[0], self.model.vocab_size)
            run = staged.feed if self.staged else compiled.feed
            return run(self, params, state, given)

    def facts(self, state: DecodeState) -> Facts:
        """What the attention retrieved, found cached, and occupies.

        Raises:
            InputError: the state was used before.
        """
        check_state(self, state)
        with own_modes():
            return facts_of(self.attention, state.cache)


def _all_stopped(last: np.ndarray, stop_tokens: tuple[int, ...]) -> bool:
    return bool(np.isin(last, (*stop_tokens, NO_TOKEN)).all())
