"""A prompt on its way into a slot, part by part, while other slots' sequences are decoded.

A prompt takes a slot of a state that goes on to be decoded. Between two layers the slot's caches
are neither the old sequence's nor the new one's. So it is parked first: a decode step writes a row
of every sequence, and a parked slot's goes where no row of the new prompt will be.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models import unstacked
from models.parameters import Params
from wavejax.attention.causal_block import block_tokens, section_blocks
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine import compiled
from wavejax.engine.batching import layer_parts
from wavejax.engine.batching.admission import parks
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.slot_reading import Part, SlotReading
from wavejax.engine.interface import Engine, Number
from wavejax.engine.prefill import read_prompt
from wavejax.engine.prompts import bucket
from wavejax.engine.staged_state import with_device_part
from wavejax.engine.state import commit


class Reading(SlotReading):
    """Reads one prompt into a slot.

    Args:
        batch: whose slot; it keeps it until the answer is seated, or `abandon`.
        slot: a free one.
        answer: whose prompt.
        whole: whether layers are read whole; else by blocks of tokens (`layer_parts`).
    """

    def __init__(self, batch: Batch, slot: int, answer: Answer, whole: bool):
        super().__init__(batch, slot, answer)
        self.whole = whole
        config = batch.engine.model_config
        prompt: Any = answer.request.prompt
        self.layers = config.num_layers  # to run: fewer for warming up
        self.padded = bucket(len(prompt))
        dtype = batch.params["params"]["embedding"].dtype
        self._block = block_tokens(self.padded, config.num_heads, dtype, config.head_dim)
        self._where = np.int32(slot), np.int32(len(prompt))
        self._kind = "begin" if parks(batch.engine.attention) else "all"
        self._layer = self._done = 0
        self._hidden: Any = None
        self._made: Any = None

    @property
    def blocks(self) -> int:
        """Blocks of the padded prompt."""
        return self.padded // self._block

    def abandon(self) -> None:
        """See `SlotReading.abandon`."""
        super().abandon()
        self._hidden, self._made = None, None

    def part(self) -> Part:
        """Say what comes next."""
        if self._kind == "enter":
            return Part(("enter", self.padded), self.blocks - self._done)
        if self._kind == "attend":
            section = section_blocks(self.blocks)
            number = self._done // section
            left = min((number + 1) * section, self.blocks) - self._done
            return Part(("attend", self.padded, number), left)
        left = self.layers - self._layer if self._kind == "layer" else 1
        return Part((self._kind, self.padded), left)

    def _run(self, units: int) -> Any:
        runs = {
            "all": self._all,
            "begin": self._begin,
            "layer": self._run_layers,
            "enter": self._enter,
            "attend": self._attend,
            "write": self._write,
            "end": self._end,
        }
        return runs[self._kind](units)

    def skip(self) -> None:
        """Leave out the rest of a layer's blocks: for warming up."""
        if self._kind in ("enter", "attend"):
            self._done = 0
            self._kind = "attend" if self._kind == "enter" else "write"

    def _begin(self, _: int) -> Any:
        engine, state = self.batch.engine, self.batch.whole_state
        prompt: Any = self.answer.request.prompt
        tokens = np.zeros((1, self.padded), np.int32)
        tokens[0, : len(prompt)] = prompt
        parked = park(engine, state.attention_state, *self._where)
        self.batch.state = dataclasses.replace(state, attention_state=parked)
        self._hidden = commit(compiled.embed(engine.model_config, self._ends, jnp.asarray(tokens)))
        self._kind = "layer" if self.whole else "enter"
        return self._hidden, engine.arrays_of(parked)

    def _run_layers(self, units: int) -> Any:
        """Run layers one after another: the device has the next one queued."""
        engine, made = self.batch.engine, None
        for _ in range(units):
            held, layer = self.batch.whole_state.attention_state, np.int32(self._layer)
            self._hidden, cache = engine.prefill_layer(
                self._weights, self._hidden, layer, *self._where, held
            )
            made = self._leave_layer(cache)
        return made

    def _enter(self, units: int) -> Any:
        config = self.batch.engine.model_config
        if self._made is None:
            self._made = commit(layer_parts.buffers(config, self._hidden))
        key, value, output = self._made
        given = self._weights, np.int32(self._layer), self._hidden, key, value
        key, value = layer_parts.enter(config, self._block, *given, *self._range(units))
        self._made = key, value, output
        self._step(units, "attend")
        return key

    def _attend(self, units: int) -> Any:
        config = self.batch.engine.model_config
        key, value, output = self._made
        given = self._weights, np.int32(self._layer), self._hidden, key, value, output
        output = layer_parts.attend(config, self._block, *given, *self._range(units))
        self._made = key, value, output
        self._step(units, "write")
        return output

    def _write(self, _: int) -> Any:
        engine, state = self.batch.engine, self.batch.whole_state
        key, value, output = self._made
        given = np.int32(self._layer), key, value, *self._where
        cache = layer_parts.write_layer(engine.attention, *given, state.attention_state)
        # The input's room takes the next layer's output.
        self._hidden, self._made = output, (key, value, self._hidden)
        return self._leave_layer(cache)

    def _end(self, _: int) -> Any:
        engine, state = self.batch.engine, self.batch.whole_state
        given = self._hidden, *self._where, state.attention_state, state.logits
        cache, logits = engine.finish_prefill(self._ends, *given)
        self.batch.state = dataclasses.replace(state, attention_state=cache, logits=logits)
        self._seat()
        self._hidden, self._made = None, None
        return logits

    def _all(self, _: int) -> Any:
        """Read the prompt at once: its attention knows no parking."""
        engine, state = self.batch.engine, self.batch.whole_state
        prompt: Any = self.answer.request.prompt
        given = prompt, self.slot, state.attention_state, state.logits
        cache, logits = read_prompt(engine, self.batch.params, *given)
        self.batch.state = dataclasses.replace(state, attention_state=cache, logits=logits)
        self._seat()
        return logits

    def _leave_layer(self, cache: Any) -> Any:
        """Go on to the next layer; return what to wait for."""
        batch = self.batch
        batch.state = dataclasses.replace(batch.whole_state, attention_state=cache)
        self._layer += 1
        self.answer.tell(self.answer.prompt_tokens * self._layer // self.layers)
        self._kind = "end" if self._layer == self.layers else "layer" if self.whole else "enter"
        return self._hidden, batch.engine.arrays_of(cache)

    def _range(self, units: int) -> tuple[np.int32, np.int32]:
        return np.int32(self._done), np.int32(units)

    def _step(self, units: int, after: str) -> None:
        """Count blocks; go on to the next kind after the last one."""
        self._done += units
        if self._done == self.blocks:
            self._done, self._kind = 0, after

    @property
    def _weights(self) -> Params:
        return unstacked.only_layer(self.batch.params, self._layer)

    @property
    def _ends(self) -> Params:
        return unstacked.without_layers(self.batch.params)


def park(engine: Engine, attention_state: Any, slot: Number, length: Number) -> Any:
    """Park a slot for a prompt of `length` tokens; `attention_state` as held, and donated.

    With full attention a step writes at the sequence's length: the new prompt's, past all its
    tokens. With wave attention it writes at the window's end: in the last place, which a prompt
    never fills. The index then has no tokens, so that none are retrieved, and it does not grow.
    """
    attention = engine.attention
    if isinstance(attention, WaveAttention):
        config = attention.config
        length = np.int32(config.sink_tokens + config.window_tokens - 1)
    return let_hold(engine, attention_state, slot, length)


def let_hold(engine: Engine, attention_state: Any, slot: Number, length: Number) -> Any:
    """Give a slot the lengths that a prompt of `length` tokens leaves; as held, and donated."""
    arrays = _let_hold(engine.attention, engine.arrays_of(attention_state), slot, length)
    return with_device_part(attention_state, arrays)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _let_hold(attention: AnyAttention, state: Any, slot: Array, length: Array) -> Any:
    return attention.finish_prefill(state, slot, length)
