"""`fetch="staged"`: rows in the host's hands, for devices whose kernels cannot read host memory.

A decode step is then no single program: Python runs three a layer. The first says which rows are
missed; while their numbers come to the host, the second attends to all else; the rows are gathered
there, sent with `jax.device_put`, and the third attends to them, admits them to the row cache and
ends the layer. The tokens are those that rows read in place give, but for rounding.

The second program is queued before the rows are sent: a device that takes both in order has done it
by the time they are gathered.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from models import unstacked
from models.parameters import Params
from wavejax.attention.wave import WaveAttention
from wavejax.engine import compiled, penalties
from wavejax.engine import staged_programs as programs
from wavejax.engine.interface import Engine, Number
from wavejax.engine.staged_state import StagedState, hold_rows
from wavejax.engine.state import NO_TOKEN, DecodeState
from wavejax.store.host_rows import HostRows
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True)
class StagedEngine(Engine):
    """Brings the rows that a layer misses from the host's memory; its attention is wave attention.

    `unroll` is of no effect: Python goes through the layers.
    """

    attention: WaveAttention

    def hold(self, empty: Any) -> StagedState:
        """See `Engine`: the rows' room is made in the host's memory."""
        return hold_rows(self.attention, empty)

    def holds(self, attention_state: Any) -> bool:
        """See `Engine`."""
        return isinstance(attention_state, StagedState)

    def arrays_of(self, attention_state: StagedState) -> WaveState:
        """See `Engine`: all but the rows."""
        return attention_state.on_device

    def prefill_layer(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        layer: Number,
        sequence: Number,
        length: Number,
        attention_state: StagedState,
    ) -> tuple[Float[Array, "1 tokens hidden"], StagedState]:
        """See `Engine`; also brings the rows to the host: one layer behind."""
        given = params, hidden, layer, sequence, length, attention_state.on_device
        hidden, (on_device, rows) = programs.prefill_layer(
            self.model_config, self.attention, *given
        )
        stored = attention_state.rows
        stored.put((int(layer), int(sequence), slice(None), slice(0, rows.shape[1])), rows)
        return hidden, StagedState(on_device, stored)

    def finish_prefill(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        sequence: Number,
        length: Number,
        attention_state: StagedState,
        logits: Float[Array, "batch vocab"],
    ) -> tuple[StagedState, Float[Array, "batch vocab"]]:
        """See `Engine`."""
        given = params, hidden, sequence, length, attention_state.on_device, logits
        on_device, logits = compiled.finish_prefill(self.model_config, self.attention, *given)
        return StagedState(on_device, attention_state.rows), logits

    def decode_n(
        self,
        params: Params,
        state: DecodeState,
        steps: int,
        first: Int[Array, " batch"] | None = None,
    ) -> tuple[DecodeState, Int[Array, "steps batch"]]:
        """See `Engine`."""
        assert first is None  # as `draws_ahead` says
        nothing = jnp.full(state.finished.shape, NO_TOKEN, jnp.int32)
        tokens: list[Array] = []
        while len(tokens) < steps and not np.asarray(state.finished).all():
            held = _held(state)
            on_device = dataclasses.replace(state, attention_state=held.on_device)
            state, drawn, shown = programs.draw(self, on_device)
            # Its arrays went through the program, its rows did not.
            assert isinstance(state.attention_state, WaveState)
            held = StagedState(state.attention_state, held.rows)
            state = self.feed(params, dataclasses.replace(state, attention_state=held), drawn)
            tokens.append(shown)
        if not steps:
            return state, nothing[None][:0]
        return state, jnp.stack(tokens + [nothing] * (steps - len(tokens)))

    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """See `Engine`."""
        logits = []
        for step in tokens:
            logits.append(state.logits)
            state = self.feed(params, state, step)
        return state, jnp.stack(logits) if logits else state.logits[None][:0]

    def feed(self, params: Params, state: DecodeState, tokens: Int[Array, " batch"]) -> DecodeState:
        """See `Engine`: compiles its programs itself."""
        model_config, attention = self.model_config, self.attention
        held = _held(state)
        on_device, rows = held.on_device, held.rows
        on_device = grow(attention, on_device, rows, np.asarray(programs.due(attention, on_device)))
        hidden, positions = programs.enter_step(model_config, attention, params, on_device, tokens)
        for layer in range(model_config.num_layers):
            at, weights = np.int32(layer), unstacked.only_layer(params, layer)
            selection, missed, slots, on_device = programs.select(
                model_config, attention, weights, at, hidden, positions, on_device
            )
            missed.copy_to_host_async()
            zones, on_device = programs.attend(attention, at, selection, on_device)
            block = jax.device_put(rows.gather(layer, np.asarray(missed)))
            of_missed = selection.query, zones, missed, slots, block
            hidden, on_device = programs.finish(
                model_config, attention, weights, at, hidden, *of_missed, on_device
            )
        logits, on_device = programs.leave_step(
            model_config, attention, params, hidden, state.finished, on_device
        )
        counts = state.counts and penalties.count_step(state.counts, tokens, state.finished)
        new = {"attention_state": StagedState(on_device, rows), "logits": logits, "counts": counts}
        return dataclasses.replace(state, step=state.step + 1, **new)


def _held(state: DecodeState) -> StagedState:
    """Return the attention's state, as `check_state` has seen it to be."""
    assert isinstance(state.attention_state, StagedState)
    return state.attention_state


def grow(attention: WaveAttention, state: WaveState, rows: HostRows, due: np.ndarray) -> WaveState:
    """Grows the due sequences' indexes, and takes the rows that leave their windows."""
    if not due.any():
        return state
    size = attention.config.growth_tokens
    starts = np.asarray(state.index.tokens)
    for sequence in np.flatnonzero(due).tolist():
        start = int(starts[sequence])
        dtype = rows.rows.dtype
        oldest = programs.oldest(state.steady.window, np.int32(sequence), size, dtype)
        rows.put((slice(None), sequence, slice(None), slice(start, start + size)), oldest)
    return programs.grow_index(attention, state, due)
