"""An attention that is none of this library's: `Generator`, facts and plans take it as it is."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from models import decoder
from models.errors import InputError
from tests.support.tiny_generator import MODEL, make_params, make_prompts
from wavejax import Attention, DenseAttention, Generator, WaveAttention, make_plan
from wavejax.engine.state_checks import check_state
from wavejax.loading import attention_of, check_placement
from wavejax.planning.free_memory import FreeMemory
from wavejax.planning.memory import memory_need

WINDOW, STEPS = 12, 20
LENGTHS = (40, 5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """The last tokens' keys and values, `[layers, batch, heads, window, dim]`, by position."""

    keys: jax.Array
    values: jax.Array
    tokens: jax.Array
    room: jax.Array


@dataclasses.dataclass(frozen=True)
class SlidingAttention(Attention[Ring]):
    """Attends to the last `window` tokens, its own included, and keeps no others."""

    window: int = WINDOW

    def init_state(self, shape, batch, prompt_tokens, new_tokens, dtype, *, shortest_prompt=1):
        size = (*shape.stack(batch), self.window, shape.head_dim)
        room = jnp.full(batch, prompt_tokens + new_tokens, jnp.int32)
        return Ring(jnp.zeros(size, dtype), jnp.zeros(size, dtype), jnp.zeros_like(room), room)

    @property
    def state_type(self):
        return Ring

    def prefill(self, layer, query, key, value, state, *, sequence, length):
        tokens = query.shape[1]
        ago = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        output = _attend(query, key, value, ((ago >= 0) & (ago < self.window))[None])
        where = {"sequence": sequence, "length": length}
        return output, self.write_prompt(layer, key[0], value[0], state, **where)

    def write_prompt(self, layer, key, value, state, *, sequence, length):
        # Of each place the last position that falls on it.
        place = jnp.arange(self.window)
        position = length - 1 - (length - 1 - place) % self.window
        kept = jnp.maximum(position, 0)

        def write(ring, new):
            return ring.at[layer, sequence].set(jnp.swapaxes(new[kept], 0, 1).astype(ring.dtype))

        keys, values = write(state.keys, key), write(state.values, value)
        return dataclasses.replace(state, keys=keys, values=values)

    def finish_prefill(self, state, sequence, length):
        tokens = state.tokens.at[sequence].set(length)
        return dataclasses.replace(state, tokens=tokens)

    def lengths(self, state):
        return state.tokens

    def remaining(self, state):
        return state.room - state.tokens

    def decode(self, layer, query, key, value, state):
        batch = jnp.arange(query.shape[0])
        at = state.tokens % self.window

        def write(ring, new):
            return ring.at[layer, batch, :, at].set(new[:, 0].astype(ring.dtype))

        keys, values = write(state.keys, key), write(state.values, value)
        seen = jnp.arange(self.window) <= state.tokens[:, None]
        rows = (jnp.swapaxes(ring[layer], 1, 2) for ring in (keys, values))
        output = _attend(query, *rows, seen[:, None])
        return output, dataclasses.replace(state, keys=keys, values=values)

    def advance(self, state, active):
        return dataclasses.replace(state, tokens=state.tokens + active.astype(jnp.int32))


def _attend(query, key, value, seen):
    """`seen` is `[batch or 1, queries, keys]`."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def plain_answer(params, prompt, steps):
    """Greedy tokens, the whole text run through the model again for each."""
    room = len(prompt) + steps
    apart = np.subtract.outer(np.arange(room), np.arange(room))
    seen = jnp.asarray((apart >= 0) & (apart < WINDOW))

    def attend(layer, query, key, value, state):
        groups = query.reshape(1, room, MODEL.num_kv_heads, -1, MODEL.head_dim)
        logits = jnp.einsum("bqhgd,bkhd->bhgqk", groups, key) * MODEL.head_dim**-0.5
        mass = jnp.where(seen, jnp.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
        output = jnp.einsum("bhgqk,bkhd->bqhgd", mass / mass.sum(axis=-1, keepdims=True), value)
        return output.reshape(query.shape), state

    @jax.jit
    def logits_at(tokens, place):
        positions = jnp.arange(room, dtype=jnp.int32)[None]
        hidden, _ = decoder.apply_model(MODEL, params, tokens, positions, attend, None)
        return decoder.unembed(MODEL, params, hidden[0, place])

    tokens = np.zeros((1, room), np.int32)
    tokens[0, : len(prompt)] = prompt
    for place in range(len(prompt), room):
        tokens[0, place] = int(jnp.argmax(logits_at(tokens, place - 1)))
    return tokens[0, len(prompt) :].tolist()


def test_it_generates_what_a_plain_loop_does():
    params, prompts = make_params(), make_prompts(LENGTHS)
    generator = Generator(MODEL, SlidingAttention())
    state = generator.start(params, prompts, max_new_tokens=STEPS)
    state, tokens = generator.decode_n(params, state, STEPS)
    expected = [plain_answer(params, prompt, STEPS) for prompt in prompts]
    assert np.asarray(tokens).T.tolist() == expected
    # A window that held all would answer otherwise: the test would see no difference.
    dense = Generator(MODEL, DenseAttention())
    other = dense.decode_n(params, dense.start(params, prompts, STEPS), STEPS)[1]
    assert np.asarray(other).T.tolist() != expected
    facts = generator.facts(state)
    assert (facts.retrieved_share, facts.hit_ratio, facts.indexed_tokens) == (1.0, None, 0)


def test_another_attentions_state_is_refused():
    params, prompts = make_params(), make_prompts(LENGTHS[1:])
    state = Generator(MODEL, DenseAttention()).start(params, prompts, 1)
    own = Generator(MODEL, SlidingAttention())
    with pytest.raises(InputError, match="not SlidingAttention's of this generator"):
        check_state(own.engine, own.sampler, state)


def test_it_is_planned_by_the_bytes_of_its_state():
    attention = SlidingAttention()
    shape = 2, 1000, 10
    need = memory_need(MODEL, attention, *shape, jnp.float32)
    row = 4 * 2 * MODEL.num_kv_heads * MODEL.head_dim
    assert need.rows == 2 * (MODEL.num_layers * WINDOW * row + 2 * 4)
    assert (need.index, need.cache, need.slots, need.staged) == (0, 0, 0, False)
    plan = make_plan(MODEL, attention, *shape, jnp.float32, free=FreeMemory(None, 2**30))
    assert plan.attention is attention
    assert plan.reason == "it keeps keys and values on the device"
    plan.check()

    class Unhashable(SlidingAttention):
        __hash__ = None

    assert memory_need(MODEL, Unhashable(), *shape, jnp.float32) == need


def test_load_takes_it_and_no_other_place_for_it():
    attention = SlidingAttention()
    assert attention_of(attention) is attention
    check_placement(attention, "auto", "auto")
    for place in (("host", "auto"), ("auto", "staged")):
        with pytest.raises(InputError, match="for wave attention"):
            check_placement(attention, *place)
    with pytest.raises(InputError, match="the WaveAttention's own"):
        check_placement(WaveAttention(), "host", "auto")


def test_what_is_no_attention_or_has_no_hash_is_refused():
    # Tests check the types of fields before the class does.
    with pytest.raises((InputError, TypeCheckError), match="attention"):
        Generator(MODEL, "wave")

    class Unhashable(DenseAttention):
        __hash__ = None

    with pytest.raises(InputError, match="make it a frozen dataclass"):
        Generator(MODEL, Unhashable())
