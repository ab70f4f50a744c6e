"""Generation: prefill in buckets, a compiled decode step, many steps in one call."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from models.parameters import Params
from wavejax.engine import appending, compiled
from wavejax.engine.checks import MOST_INT32, as_prompts, as_tokens, whole_number
from wavejax.engine.facts import Facts, facts_of
from wavejax.engine.modes import own_modes
from wavejax.engine.reader import Reader
from wavejax.engine.state import NO_TOKEN, DecodeState
from wavejax.engine.state_checks import check_draws, check_params, check_room, check_state

STREAM_CHUNK = compiled.STEPS_AT_LEAST  # Steps in one call while streaming: seen at once.


@dataclasses.dataclass(frozen=True)
class Generator(Reader):
    """Generates text with a model, an attention and a sampler.

    Hashable: its compiled programs are kept by JAX and shared by equal generators; those that read
    prompts, by all generators of equal model and attention.

    Its methods compute in JAX's standard modes, whatever modes the caller's program has set.

    Attributes:
        model_config: the model's configuration.
        attention: any `Attention`, such as `WaveAttention` or `DenseAttention`.
        sampler: how a token is drawn; greedy by default.
        stop_tokens: a sequence ends after any of these; any iterable of token ids.
        unroll: write all layers out in the compiled step; None does on GPUs, where it is faster.
            Of no effect with `fetch="staged"`, whose step is a few programs a layer.

    Raises:
        InputError: a part is of another kind, the attention has no hash, or a stop token is not
            the model's.
    """

    def stream(
        self, params: Params, state: DecodeState, max_new_tokens: SupportsIndex
    ) -> Iterator[tuple[DecodeState, Int[np.ndarray, "steps batch"]]]:
        """Generate and yield tokens as they come, one call of the device behind.

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
        """Generate `steps` tokens a sequence in one compiled call; donate `state`.

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
        """Run given tokens through the decode step (teacher forcing); donate `state`.

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

    def append(
        self,
        params: Params,
        state: DecodeState,
        tokens: Iterable[int],
        *,
        slot: SupportsIndex = 0,
    ) -> DecodeState:
        """Read more tokens into a sequence, as if its prompt had gone on; donates `state`.

        For a question after a document, or a chat's next turn: it costs the new tokens only. They
        attend exactly to all that the sequence holds. With full attention the state is that of the
        whole prompt, but for rounding; with wave attention the new tokens are in the window, or in
        segments of the index that grew as it filled.

        Args:
            params: the model's parameters.
            state: of `start`, `insert` or steps; it must have room for the tokens.
            tokens: token ids, at least one. A stop token that ended an answer is not among what the
                sequence holds: begin with it where the model's format has one there.
            slot: the sequence's place in the batch. Where it was finished it goes on.

        Raises:
            InputError: a token is not the model's, the slot holds nothing, or has no room.
        """
        check_params(params, self.model_config)
        check_state(self.engine, self.sampler, state)
        given = as_prompts([tokens], self.model_config.vocab_size)[0]
        at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
        with own_modes():
            appending.check_append(self.engine, state, at, len(given))
            return appending.append(self.engine, params, state, at, given)

    def feed(
        self, params: Params, state: DecodeState, tokens: Int[Array | np.ndarray, " batch"]
    ) -> DecodeState:
        """Run one given token of each sequence: a decode step, to be compiled by the caller.

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
        """Return what the attention retrieved, found cached, and occupies.

        Raises:
            InputError: the state was used before.
        """
        check_state(self.engine, self.sampler, state)
        with own_modes():
            return facts_of(self.attention, state.attention_state)


def _all_stopped(last: np.ndarray, stop_tokens: tuple[int, ...]) -> bool:
    return bool(np.isin(last, (*stop_tokens, NO_TOKEN)).all())
