"""Generation: prefill in buckets, a compiled decode step, many steps in one call."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from models import decoder, unstacked
from models.config import ModelConfig
from models.parameters import Params
from wavejax._pytree import state as pytree
from wavejax.dense_attention import DenseAttention
from wavejax.facts import Facts, facts_of
from wavejax.prompts import bucket, check_prompts
from wavejax.sampling import Sampler, step_key
from wavejax.wave_attention import WaveAttention

NO_TOKEN = -1  # What a sequence yields once it has stopped.
STREAM_CHUNK = 8  # Steps in one call while streaming: what a reader sees at once.


@pytree
class DecodeState:
    """A batch of sequences being generated.

    Attributes:
        cache: the attention's state.
        logits: `[batch, vocab]` float32, of the next token.
        finished: `[batch]` bool, sequences that have yielded a stop token.
        seed: int32 scalar.
        step: int32 scalar, tokens generated so far.
    """

    cache: Any
    logits: Array
    finished: Array
    seed: Array
    step: Array


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates text with a model, an attention and a sampler.

    Hashable: its compiled programs are kept by JAX and shared by equal generators; those that read
    prompts, by all generators of equal model and attention.

    Attributes:
        model: the model's configuration.
        attention: `WaveAttention` or `DenseAttention`.
        sampler: how a token is drawn; greedy by default.
        stop_tokens: a sequence ends after any of these.
        unroll: write all layers out in the compiled step; None does on GPUs, where it is faster.
    """

    model: ModelConfig
    attention: WaveAttention | DenseAttention
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    stop_tokens: tuple[int, ...] = ()
    unroll: bool | None = None

    @property
    def unrolls(self) -> bool:
        """Whether the compiled step writes all layers out: then unstacked ones are faster."""
        return jax.default_backend() == "gpu" if self.unroll is None else self.unroll

    def start(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeState:
        """Reads the prompts, one by one, and builds their caches.

        Prompts do not share a program run, so each gets what it would get alone.

        Args:
            params: the model's parameters, their layers stacked or unstacked; so in all methods.
            prompts: token ids, at least one each.
            max_new_tokens: room to generate so many tokens each.
            seed: of the sampler.
            progress: called with (layers done, layers in all) as the layers of all prompts finish.

        Raises:
            InputError: there is no prompt, one is empty, or a token is not the model's.
        """
        check_prompts(prompts, self.model.vocab_size)
        batch = len(prompts)
        dtype = params["params"]["embedding"].dtype
        rooms = [bucket(len(prompt)) for prompt in prompts]
        cache = self.attention.init_state(self.model, batch, max(rooms), max_new_tokens, dtype)
        cache, logits = _commit((cache, jnp.zeros((batch, self.model.vocab_size), jnp.float32)))
        layers, done = self.model.num_layers, 0
        ends = unstacked.without_layers(params)
        for sequence, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            padded = np.zeros((1, room), np.int32)
            padded[0, : len(prompt)] = prompt
            length = jnp.int32(len(prompt))
            hidden = _commit(_embed(self.model, ends, jnp.asarray(padded)))
            for layer in range(layers):
                previous = hidden
                hidden, cache = _prefill_layer(
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
            cache, logits = _finish_prefill(
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
        return DecodeState(cache, logits, *_commit(rest))

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
        """
        # The room is a power of two, so that a remainder of steps needs no program of its own.
        room = max(STREAM_CHUNK, 2 ** (steps - 1).bit_length())
        state, tokens = _decode_n(self, params, state, jnp.int32(steps), room)
        return state, tokens[:steps]

    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """Runs given tokens through the decode step (teacher forcing); donates `state`.

        Returns:
            the new state, and the logits from which each of the tokens would have been drawn.
        """
        return _force(self, params, state, jnp.asarray(tokens, jnp.int32))

    def feed(self, params: Params, state: DecodeState, tokens: Int[Array, " batch"]) -> DecodeState:
        """Runs one given token of each sequence: a decode step, to be compiled by the caller.

        A sequence whose `finished` is set forgets its token.
        """
        return _feed(self, params, state, tokens)

    def facts(self, state: DecodeState) -> Facts:
        """What the attention retrieved, found cached, and occupies."""
        return facts_of(state.cache)


def _commit(tree: Any) -> Any:
    """Ties arrays to the device they are on, as what a compiled call returns already is.

    Otherwise a program compiles twice: for the first call's arrays, and for its own results.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def _all_stopped(last: np.ndarray, stop_tokens: tuple[int, ...]) -> bool:
    return bool(np.isin(last, (*stop_tokens, NO_TOKEN)).all())


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: ModelConfig, params: Params, tokens: Array) -> Array:
    return decoder.embed(model, params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _prefill_layer(
    model: ModelConfig,
    attention: WaveAttention | DenseAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    length: Array,
    cache: Any,
) -> tuple[Array, Any]:
    attend = functools.partial(attention.prefill, sequence=sequence, length=length)
    positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    return decoder.apply_layer(model, params, layer, hidden, positions, attend, cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("cache", "logits"))
def _finish_prefill(
    model: ModelConfig,
    attention: WaveAttention | DenseAttention,
    params: Params,
    hidden: Array,
    sequence: Array,
    length: Array,
    cache: Any,
    logits: Array,
) -> tuple[Any, Array]:
    last = lax.dynamic_slice_in_dim(hidden[0], length - 1, 1)
    last = decoder.unembed(model, params, decoder.final_norm(model, params, last))
    cache = attention.finish_prefill(cache, sequence, length)
    return cache, logits.at[sequence].set(last[0])


def _feed(generator: Generator, params: Params, state: DecodeState, tokens: Array) -> DecodeState:
    """Runs one token of each sequence through the model."""
    attention = generator.attention
    cache: Any = attention.grow(state.cache)
    positions = attention.lengths(cache)[:, None]
    hidden, cache = decoder.apply_model(
        generator.model,
        params,
        tokens[:, None],
        positions,
        attention.decode,
        cache,
        unroll=generator.unrolls,
    )
    cache = attention.advance(cache, ~state.finished)
    logits = decoder.unembed(generator.model, params, hidden[:, 0])
    return DecodeState(cache, logits, state.finished, state.seed, state.step + 1)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnames="state")
def _decode_n(
    generator: Generator, params: Params, state: DecodeState, steps: Array, room: int
) -> tuple[DecodeState, Array]:
    stop = jnp.asarray(generator.stop_tokens, jnp.int32)

    def one_step(carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
        state, tokens, i = carry
        # Past its room a sequence would overwrite what it has read.
        full = generator.attention.is_full(state.cache)
        state = dataclasses.replace(state, finished=state.finished | full)
        drawn = generator.sampler.sample(state.logits, step_key(state.seed, state.step))
        tokens = tokens.at[i].set(jnp.where(state.finished, NO_TOKEN, drawn))
        finished = state.finished | jnp.isin(drawn, stop)
        state = dataclasses.replace(state, finished=finished)
        return _feed(generator, params, state, drawn), tokens, i + 1

    def more(carry: tuple[DecodeState, Array, Array]) -> Array:
        state, _, i = carry
        return (i < steps) & ~jnp.all(state.finished)

    empty = jnp.full((room, state.finished.shape[0]), NO_TOKEN, jnp.int32)
    state, tokens, _ = lax.while_loop(more, one_step, (state, empty, jnp.int32(0)))
    return state, tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _force(
    generator: Generator, params: Params, state: DecodeState, tokens: Array
) -> tuple[DecodeState, Array]:
    def one_step(state: DecodeState, tokens: Array) -> tuple[DecodeState, Array]:
        return _feed(generator, params, state, tokens), state.logits

    return lax.scan(one_step, state, tokens)
