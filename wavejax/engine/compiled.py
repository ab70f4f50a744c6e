"""The engine whose decode step is one compiled program, sampling included."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from models import decoder
from models.config import ModelConfig
from models.parameters import Params
from wavejax.attention.protocol import AnyAttention
from wavejax.engine import penalties, two_rows
from wavejax.engine.interface import Engine, Number
from wavejax.engine.sampling import draw_tokens, step_keys
from wavejax.engine.staged_state import StagedState
from wavejax.engine.state import NO_TOKEN, DecodeState

STEPS_AT_LEAST = 8  # Room for so many tokens in a call's result: fewer steps share its program.


@dataclasses.dataclass(frozen=True)
class CompiledEngine(Engine):
    """All layers of a decode step, and many steps, in one program that never waits for Python."""

    def hold(self, empty: Any) -> Any:
        """See `Engine`: it is held as it is."""
        return empty

    def holds(self, attention_state: Any) -> bool:
        """See `Engine`."""
        of_kind = isinstance(attention_state, self.attention.state_type)
        return of_kind and not isinstance(attention_state, StagedState)

    def arrays_of(self, attention_state: Any) -> Any:
        """See `Engine`."""
        return attention_state

    def prefill_layer(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        layer: Number,
        sequence: Number,
        length: Number,
        attention_state: Any,
    ) -> tuple[Float[Array, "1 tokens hidden"], Any]:
        """See `Engine`."""
        where = layer, sequence, length
        return prefill_layer(
            self.model_config, self.attention, params, hidden, *where, attention_state
        )

    def finish_prefill(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        sequence: Number,
        length: Number,
        attention_state: Any,
        logits: Float[Array, "batch vocab"],
    ) -> tuple[Any, Float[Array, "batch vocab"]]:
        """See `Engine`."""
        given = params, hidden, sequence, length, attention_state, logits
        return finish_prefill(self.model_config, self.attention, *given)

    @property
    def draws_ahead(self) -> bool:
        """See `Engine`."""
        return True

    def first_tokens(
        self, state: DecodeState
    ) -> tuple[Int[Array, " batch"], Int[Array, "1 batch"]]:
        """See `Engine`."""
        return first_tokens(self, state)

    def decode_n(
        self,
        params: Params,
        state: DecodeState,
        steps: int,
        first: Int[Array, " batch"] | None = None,
    ) -> tuple[DecodeState, Int[Array, "steps batch"]]:
        """See `Engine`."""
        given = _none_drawn(state.finished) if first is None else first
        # The room is a power of two, so that a remainder of steps needs no program of its own.
        room = max(STEPS_AT_LEAST, 2 ** (steps - 1).bit_length())
        state, tokens = decode_n(self, params, state, np.int32(steps), room, given)
        return state, tokens[:steps]

    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """See `Engine`."""
        return force(self, params, state, tokens)

    def feed(self, params: Params, state: DecodeState, tokens: Int[Array, " batch"]) -> DecodeState:
        """See `Engine`: to be compiled by the caller."""
        return feed(self, params, state, tokens)


@functools.partial(jax.jit, static_argnums=0)
def embed(model_config: ModelConfig, params: Params, tokens: Array) -> Array:
    """Look up the tokens' embeddings."""
    return decoder.embed(model_config, params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="attention_state")
def prefill_layer(
    model_config: ModelConfig,
    attention: AnyAttention,
    params: Params,
    hidden: Array,
    layer: Array,
    sequence: Array,
    length: Array,
    attention_state: Any,
) -> tuple[Array, Any]:
    """Run one layer over a padded prompt; see `Engine`."""
    attend = functools.partial(attention.prefill, sequence=sequence, length=length)
    positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    return decoder.apply_layer(
        model_config, params, layer, hidden, positions, attend, attention_state
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("attention_state", "logits"))
def finish_prefill(
    model_config: ModelConfig,
    attention: AnyAttention,
    params: Params,
    hidden: Array,
    sequence: Array,
    length: Array,
    attention_state: Any,
    logits: Array,
) -> tuple[Any, Array]:
    """Set a read sequence's length and its row of the logits; see `Engine`."""
    last = lax.dynamic_slice_in_dim(hidden[0], length - 1, 1)
    last = decoder.unembed(model_config, params, decoder.final_norm(model_config, params, last))
    attention_state = attention.finish_prefill(attention_state, sequence, length)
    return attention_state, logits.at[sequence].set(last[0])


def feed(engine: Engine, params: Params, state: DecodeState, tokens: Array) -> DecodeState:
    """Run one token of each sequence through the model."""
    attention = engine.attention
    attention_state: Any = attention.grow(state.attention_state)
    positions = attention.lengths(attention_state)[:, None]
    fed = tokens[:, None]
    attend: decoder.Attend[Any] = attention.decode
    if two_rows.takes_two(params, len(tokens), engine.unrolls):
        fed, positions = map(two_rows.repeated, (fed, positions))
        attend = two_rows.of_first(attend)
    hidden, attention_state = decoder.apply_model(
        engine.model_config,
        params,
        fed,
        positions,
        # A function of its own: where layers are written out, it is traced and lowered once.
        jax.jit(attend),
        attention_state,
        unroll=engine.unrolls,
    )
    attention_state = attention.advance(attention_state, ~state.finished)
    logits = decoder.unembed(engine.model_config, params, hidden[: len(tokens), 0])
    counts = state.counts and penalties.count(state.counts, tokens, state.finished)
    new = {"attention_state": attention_state, "logits": logits, "counts": counts}
    return dataclasses.replace(state, step=state.step + 1, **new)


def draw(
    engine: Engine, state: DecodeState, given: Array | None = None
) -> tuple[DecodeState, Array, Array]:
    """Draws the next tokens.

    Args:
        engine: what generates.
        state: before.
        given: `[batch]` int32, tokens that were drawn already; NO_TOKEN where none was.

    Returns:
        the state, with who is finished; the tokens to feed; and what to show, NO_TOKEN for those
        that were finished before, and for those whose logits are not finite.
    """
    # Past its room a sequence would overwrite what it has read.
    finished = state.finished | engine.attention.is_full(state.attention_state)
    # What comes after a sequence's end says nothing of its answer.
    bad = ~finished & ~jnp.all(jnp.isfinite(state.logits), axis=-1)
    logits = state.logits
    if state.sampling.penalties is not None:
        assert state.counts is not None  # as `Generator` sees to
        logits = penalties.penalised(state.sampling.penalties, logits, state.counts)
    keys = step_keys(state.seed, state.step, state.sequences)
    drawn = draw_tokens(state.sampling, logits, keys)
    if given is not None:
        drawn = jnp.where(given == NO_TOKEN, drawn, given)
    shown = jnp.where(finished | bad, NO_TOKEN, drawn)
    stopped = jnp.isin(drawn, jnp.asarray(engine.stop_tokens, jnp.int32))
    state = dataclasses.replace(
        state, finished=finished | bad | stopped, nonfinite=state.nonfinite | bad
    )
    return state, drawn, shown


def _none_drawn(finished: Array) -> Array:
    """Return NO_TOKEN for each sequence, where the state is: one program for both."""
    if isinstance(finished, jax.core.Tracer):
        return jnp.full(finished.shape, NO_TOKEN, jnp.int32)
    return _no_tokens(finished.shape, finished.sharding)


@functools.lru_cache(maxsize=64)
def _no_tokens(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Array:
    return jax.device_put(np.full(shape, NO_TOKEN, np.int32), sharding)


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(engine: Engine, state: DecodeState) -> tuple[Array, Array]:
    """Draw the next step's tokens; see `Engine`."""
    _, drawn, shown = draw(engine, state)
    return drawn, shown[None]


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnames="state")
def decode_n(
    engine: Engine,
    params: Params,
    state: DecodeState,
    steps: Array,
    room: int,
    first: Array | None = None,
) -> tuple[DecodeState, Array]:
    """Draw and feed tokens until all have stopped, `steps` at most; see `Engine`."""

    def one_step(carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
        state, tokens, i = carry
        given = None if first is None else jnp.where(i == 0, first, NO_TOKEN)
        state, drawn, shown = draw(engine, state, given)
        return feed(engine, params, state, drawn), tokens.at[i].set(shown), i + 1

    def more(carry: tuple[DecodeState, Array, Array]) -> Array:
        state, _, i = carry
        return (i < steps) & ~jnp.all(state.finished)

    empty = jnp.full((room, state.finished.shape[0]), NO_TOKEN, jnp.int32)
    state, tokens, _ = lax.while_loop(more, one_step, (state, empty, jnp.int32(0)))
    return state, tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def force(
    engine: Engine, params: Params, state: DecodeState, tokens: Array
) -> tuple[DecodeState, Array]:
    """Feed given tokens and keep the logits; see `Engine`."""

    def one_step(state: DecodeState, tokens: Array) -> tuple[DecodeState, Array]:
        return feed(engine, params, state, tokens), state.logits

    return lax.scan(one_step, state, tokens)
