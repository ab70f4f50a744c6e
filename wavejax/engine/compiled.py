"""The compiled programs of a generation, and what they work on."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from models import decoder
from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params
from wavejax._pytree import state as pytree
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine import penalties
from wavejax.engine.checks import as_stop_tokens
from wavejax.engine.penalties import TokenCounts
from wavejax.engine.sampling import Sampler, step_keys

NO_TOKEN = -1  # What a sequence yields once it has stopped.


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a generator is made of; see `Generator`."""

    model: ModelConfig
    attention: WaveAttention | DenseAttention
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    stop_tokens: tuple[int, ...] = ()
    unroll: bool | None = None

    def __post_init__(self) -> None:
        for name, kinds in (
            ("model", ModelConfig),
            ("attention", WaveAttention | DenseAttention),
            ("sampler", Sampler),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                raise InputError(
                    f"{name} is of type {type(value).__name__}; give a {_names(kinds)}"
                )
        stops = as_stop_tokens(self.stop_tokens, self.model.vocab_size)
        object.__setattr__(self, "stop_tokens", stops)

    @property
    def unrolls(self) -> bool:
        """Whether the compiled step writes all layers out: then unstacked ones are faster."""
        return jax.default_backend() == "gpu" if self.unroll is None else self.unroll


def _names(kinds: Any) -> str:
    return " or a ".join(kind.__name__ for kind in getattr(kinds, "__args__", (kinds,)))


@pytree
class DecodeState:
    """A batch of sequences being generated.

    Attributes:
        cache: the attention's state.
        logits: `[batch, vocab]` float32, of the next token.
        finished: `[batch]` bool, sequences that yield no more tokens: they have yielded a stop
            token, their room is full, or their logits were not finite.
        seed: int32 scalar.
        step: int32 scalar, tokens generated so far.
        sequences: `[batch]` int32, the numbers by which each one's noise is keyed; 0, 1, 2, ...
            where left out.
        nonfinite: `[batch]` bool, sequences that ended because NaN or infinity was among their
            logits; none where left out.
        counts: what each has said; None where no penalty asks for it.
    """

    cache: Any
    logits: Array
    finished: Array
    seed: Array
    step: Array
    sequences: Array = None  # type: ignore[assignment]
    nonfinite: Array = None  # type: ignore[assignment]
    counts: TokenCounts | None = None

    def __post_init__(self) -> None:
        batch = self.finished.shape[0]
        for name, dtype, make in (
            ("sequences", jnp.int32, jnp.arange),
            ("nonfinite", bool, jnp.zeros),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, make(batch, dtype=dtype))


def commit(tree: Any) -> Any:
    """Ties arrays to the device they are on, as what a compiled call returns already is.

    Otherwise a program compiles twice: for the first call's arrays, and for its own results.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


@functools.partial(jax.jit, static_argnums=0)
def embed(model: ModelConfig, params: Params, tokens: Array) -> Array:
    return decoder.embed(model, params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def prefill_layer(
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
def finish_prefill(
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


def feed(generator: Parts, params: Params, state: DecodeState, tokens: Array) -> DecodeState:
    """Runs one token of each sequence through the model."""
    attention = generator.attention
    cache: Any = attention.grow(state.cache)
    positions = attention.lengths(cache)[:, None]
    hidden, cache = decoder.apply_model(
        generator.model,
        params,
        tokens[:, None],
        positions,
        # A function of its own: where layers are written out, it is traced and lowered once.
        jax.jit(attention.decode),
        cache,
        unroll=generator.unrolls,
    )
    cache = attention.advance(cache, ~state.finished)
    logits = decoder.unembed(generator.model, params, hidden[:, 0])
    counts = state.counts and penalties.count(state.counts, tokens, state.finished)
    new = {"cache": cache, "logits": logits, "counts": counts}
    return dataclasses.replace(state, step=state.step + 1, **new)


def draw(generator: Parts, state: DecodeState) -> tuple[DecodeState, Array, Array]:
    """Draws the next tokens.

    Returns:
        the state, with who is finished; the tokens to feed; and what to show, NO_TOKEN for those
        that were finished before, and for those whose logits are not finite.
    """
    # Past its room a sequence would overwrite what it has read.
    finished = state.finished | generator.attention.is_full(state.cache)
    # What comes after a sequence's end says nothing of its answer.
    bad = ~finished & ~jnp.all(jnp.isfinite(state.logits), axis=-1)
    logits = state.logits
    if generator.sampler.penalises:
        assert state.counts is not None  # as `Generator` sees to
        logits = penalties.penalised(generator.sampler, logits, state.counts)
    keys = step_keys(state.seed, state.step, state.sequences)
    drawn = generator.sampler.sample(logits, keys)
    shown = jnp.where(finished | bad, NO_TOKEN, drawn)
    stopped = jnp.isin(drawn, jnp.asarray(generator.stop_tokens, jnp.int32))
    state = dataclasses.replace(
        state, finished=finished | bad | stopped, nonfinite=state.nonfinite | bad
    )
    return state, drawn, shown


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnames="state")
def decode_n(
    generator: Parts, params: Params, state: DecodeState, steps: Array, room: int
) -> tuple[DecodeState, Array]:
    def one_step(carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
        state, tokens, i = carry
        state, drawn, shown = draw(generator, state)
        return feed(generator, params, state, drawn), tokens.at[i].set(shown), i + 1

    def more(carry: tuple[DecodeState, Array, Array]) -> Array:
        state, _, i = carry
        return (i < steps) & ~jnp.all(state.finished)

    empty = jnp.full((room, state.finished.shape[0]), NO_TOKEN, jnp.int32)
    state, tokens, _ = lax.while_loop(more, one_step, (state, empty, jnp.int32(0)))
    return state, tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def force(
    generator: Parts, params: Params, state: DecodeState, tokens: Array
) -> tuple[DecodeState, Array]:
    def one_step(state: DecodeState, tokens: Array) -> tuple[DecodeState, Array]:
        return feed(generator, params, state, tokens), state.logits

    return lax.scan(one_step, state, tokens)
