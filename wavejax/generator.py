"""Generation: prefill in buckets, a compiled decode step, many steps in one call."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models import unstacked
from models.errors import InputError
from models.parameters import Params
from wavejax import programs, staged
from wavejax.facts import Facts, facts_of
from wavejax.programs import NO_TOKEN, DecodeState, Parts
from wavejax.prompts import bucket, check_prompts
from wavejax.wave_attention import WaveAttention

STREAM_CHUNK = 8  # Steps in one call while streaming: what a reader sees at once.


@dataclasses.dataclass(frozen=True)
class Generator(Parts):
    """Generates text with a model, an attention and a sampler.

    Hashable: its compiled programs are kept by JAX and shared by equal generators; those that read
    prompts, by all generators of equal model and attention.

    Attributes:
        model: the model's configuration.
        attention: `WaveAttention` or `DenseAttention`.
        sampler: how a token is drawn; greedy by default.
        stop_tokens: a sequence ends after any of these.
        unroll: write all layers out in the compiled step; None does on GPUs, where it is faster.
            Of no effect with `fetch="staged"`, whose step is a few programs a layer.
    """

    @property
    def staged(self) -> bool:
        """Whether rows are staged; see `wavejax.staged`."""
        return isinstance(self.attention, WaveAttention) and self.attention.staged

    def start(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeState:
        """Reads the prompts, one by one, and builds their caches.

        Prompts do not share a program run, so each gets what it would get alone; but by wave
        attention only where the room, which is the same for all, makes clusters of the same size
        (`WaveConfig.cluster_sizes`).

        Args:
            params: the model's parameters, their layers stacked or unstacked; so in all methods.
            prompts: token ids, at least one each.
            max_new_tokens: room to generate so many tokens each.
            seed: of the sampler, an int32.
            progress: called with (layers done, layers in all) as the layers of all prompts finish.

        Raises:
            InputError: there is no prompt, one is empty, a token is not the model's, `seed` is no
                int32, or `max_new_tokens` is negative.
        """
        check_prompts(prompts, self.model.vocab_size)
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
        if not -(2**31) <= seed < 2**31:
            raise InputError(f"seed is {seed}; it must be from -2^31 to 2^31 - 1")
        batch = len(prompts)
        dtype = params["params"]["embedding"].dtype
        rooms = [bucket(len(prompt)) for prompt in prompts]
        cache: Any = self.attention.init_state(self.model, batch, max(rooms), max_new_tokens, dtype)
        cache, logits = programs.commit(
            (cache, jnp.zeros((batch, self.model.vocab_size), jnp.float32))
        )
        # Memory that is refused shows now, not when all has been read and compiled for nothing.
        jax.block_until_ready(cache)
        by: Any = programs
        if isinstance(self.attention, WaveAttention) and self.attention.staged:
            by, cache = staged, staged.hold_rows(self.attention, cache)
        layers, done = self.model.num_layers, 0
        ends = unstacked.without_layers(params)
        for sequence, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            padded = np.zeros((1, room), np.int32)
            padded[0, : len(prompt)] = prompt
            length = jnp.int32(len(prompt))
            hidden = programs.commit(programs.embed(self.model, ends, jnp.asarray(padded)))
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
        rest = jnp.zeros(batch, bool), jnp.int32(seed), jnp.int32(0)
        return DecodeState(cache, logits, *programs.commit(rest))

    def stream(
        self, params: Params, state: DecodeState, max_new_tokens: int
    ) -> Iterator[tuple[DecodeState, Int[np.ndarray, "steps batch"]]]:
        """Generates and yields tokens as they come, one call of the device behind.

        Yields:
            the newest state, and int32 tokens, NO_TOKEN where a sequence has stopped; its stop
            token is the last real one. Ends when all have stopped, or after `max_new_tokens`. A
            state is donated to the next call: only the last one yielded may be used.
        """
        pending = None
        done = 0
        while done < max_new_tokens:
            # The first token alone, as soon as there is one.
            steps = min(STREAM_CHUNK, max_new_tokens - done) if done else 1
            state, tokens = self.decode_n(params, state, steps)
            done += steps
            if pending is not None:
                seen = np.asarray(pending)
                yield state, seen
                if _all_stopped(seen[-1], self.stop_tokens):
                    return
            pending = tokens
        if pending is not None:
            yield state, np.asarray(pending)

    def decode_n(
        self, params: Params, state: DecodeState, steps: int
    ) -> tuple[DecodeState, Int[Array, "steps batch"]]:
        """Generates `steps` tokens a sequence in one compiled call; donates `state`.

        Returns:
            the new state, and the tokens, NO_TOKEN where a sequence had stopped before: after a
            stop token, or where the room that `start` made was full.

        Raises:
            InputError: `steps` is negative.
        """
        if steps < 0:
            raise InputError(f"steps is {steps}; it must be 0 or more")
        if self.staged:
            return staged.decode_n(self, params, state, steps)
        # The room is a power of two, so that a remainder of steps needs no program of its own.
        room = max(STREAM_CHUNK, 2 ** (steps - 1).bit_length())
        state, tokens = programs.decode_n(self, params, state, jnp.int32(steps), room)
        return state, tokens[:steps]

    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """Runs given tokens through the decode step (teacher forcing); donates `state`.

        A sequence whose `finished` is set forgets its tokens.

        Returns:
            the new state, and the logits from which each of the tokens would have been drawn.

        Raises:
            InputError: there is no room for so many tokens; not where the state is traced.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if not isinstance(state.finished, jax.core.Tracer):
            left = np.asarray(self.attention.remaining(staged.wave_of(state.cache)))
            left = left[~np.asarray(state.finished)]
            if left.size and len(tokens) > left.min():
                raise InputError(
                    f"{len(tokens)} tokens are more than there is room for, {left.min()}: give "
                    "`start` a larger max_new_tokens"
                )
        run = staged.force if self.staged else programs.force
        return run(self, params, state, tokens)

    def feed(self, params: Params, state: DecodeState, tokens: Int[Array, " batch"]) -> DecodeState:
        """Runs one given token of each sequence: a decode step, to be compiled by the caller.

        A sequence whose `finished` is set forgets its token; so should one that has no room left
        (`attention.remaining`), which is for the caller to see. With `fetch="staged"` it compiles
        its programs itself, and cannot be compiled into another.
        """
        run = staged.feed if self.staged else programs.feed
        return run(self, params, state, tokens)

    def facts(self, state: DecodeState) -> Facts:
        """What the attention retrieved, found cached, and occupies."""
        return facts_of(state.cache)


def _all_stopped(last: np.ndarray, stop_tokens: tuple[int, ...]) -> bool:
    return bool(np.isin(last, (*stop_tokens, NO_TOKEN)).all())
