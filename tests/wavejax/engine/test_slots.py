"""Slots: who joins later gets the tokens that it gets alone, and a released slot is free again."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from tests.wavejax.engine.test_compiled_programs import CompileLog
from wavejax import DenseAttention, Generator, InputError, Sampler, WaveAttention
from wavejax.engine.generator import NO_TOKEN

ATTENTIONS = {
    "dense": DenseAttention(),
    "dense in int8": DenseAttention(row_dtype="int8"),
    "device": WaveAttention(CONFIG, "device"),
    "host": WaveAttention(CONFIG, "host", "in_place"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
}
SAMPLERS = [GREEDY, Sampler(0.9, top_p=0.9), Sampler(1.4), Sampler(1.0, 5, presence_penalty=0.5)]
FIRST, SECOND, THIRD = make_prompts((262, 5, 318))
NEW_TOKENS = 90


def alone(generator, prompt, steps, sampler, seed, sequence):
    given = {"seed": seed, "sequences": [sequence], "samplers": [sampler]}
    state = generator.start(make_params(), [prompt], NEW_TOKENS, **given)
    return np.asarray(generator.decode_n(make_params(), state, steps)[1])[:, 0]


@pytest.mark.slow(60)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_who_joins_later_gets_the_tokens_that_it_gets_alone(name):
    params, generator = make_params(), Generator(MODEL, ATTENTIONS[name])
    state = generator.allocate(2, 318, NEW_TOKENS, samplers=SAMPLERS)
    assert state.finished.tolist() == [True, True]
    parts = []

    def decode(steps):
        nonlocal state
        state, tokens = generator.decode_n(params, state, steps)
        parts.append(np.asarray(tokens))

    drawn = {"seed": 3, "sampler": SAMPLERS[1]}
    state = generator.insert(params, state, 1, FIRST, **drawn)
    decode(20)
    # An empty slot yields nothing.
    assert (parts[0][:, 0] == NO_TOKEN).all()
    state = generator.insert(params, state, 0, SECOND)
    decode(50)  # the first one's index grows meanwhile, and the second one's begins
    state = generator.release(state, 1)
    decode(5)
    assert (parts[2][:, 1] == NO_TOKEN).all()
    again = {"seed": -4, "sequence": 7, "sampler": SAMPLERS[3]}
    state = generator.insert(params, state, 1, THIRD, **again)
    decode(10)
    tokens = np.concatenate(parts)
    expected = alone(generator, FIRST, 70, SAMPLERS[1], 3, 1)
    np.testing.assert_array_equal(tokens[:70, 1], expected)
    np.testing.assert_array_equal(tokens[20:, 0], alone(generator, SECOND, 65, GREEDY, 0, 0))
    expected = alone(generator, THIRD, 10, SAMPLERS[3], -4, 7)
    np.testing.assert_array_equal(tokens[75:, 1], expected)
    assert state.step.tolist() == [65, 10]


def test_a_sequence_goes_on_from_its_step():
    """Text read again as a prompt, with its noise where it was: the same tokens come."""
    params, sampler = make_params(), Sampler(1.0)
    generator = Generator(MODEL, ATTENTIONS["dense"], sampler)
    whole = alone(generator, SECOND, 12, sampler, 5, 0)
    state = generator.allocate(1, 128, NEW_TOKENS)
    text = [*SECOND, *whole[:4].tolist()]
    state = generator.insert(params, state, 0, text, seed=5, step=4)
    _, tokens = generator.decode_n(params, state, 8)
    np.testing.assert_array_equal(np.asarray(tokens)[:, 0], whole[4:])


def test_another_prompt_of_a_slot_compiles_nothing():
    params, generator = make_params(), Generator(MODEL, ATTENTIONS["dense"])
    state = generator.allocate(2, 128, 8, samplers=SAMPLERS)
    calls = []
    with CompileLog() as log:
        for slot, sampler in enumerate(SAMPLERS):
            if slot == 1:
                log.names.clear()
            state = generator.insert(
                params,
                state,
                slot % 2,
                SECOND,
                sampler=sampler,
                progress=lambda *call: calls.append(call),
            )
            state, _ = generator.decode_n(params, state, 2)
            state = generator.release(state, slot % 2)
    assert not log.names
    assert calls == [(1, 2), (2, 2)] * len(SAMPLERS)


def test_what_does_not_fit_a_slot_is_refused():
    params, generator = make_params(), Generator(MODEL, ATTENTIONS["dense"])
    state = generator.allocate(2, 100, 8, samplers=[Sampler(1.0, top_k=4)])
    state = generator.insert(params, state, 1, SECOND)

    def refused(**changes):
        given = {"state": state, "slot": 0, "prompt": SECOND} | changes
        with pytest.raises(InputError) as error:
            generator.insert(params, **given)
        return str(error.value)

    assert refused(slot=1) == "slot 1 is in use: `release` it first"
    assert refused(slot=2) == "slot is 2; it must be a whole number from 0 to 1"
    assert "has 262 tokens, and there is room for 128" in refused(prompt=FIRST)
    for sampler in (Sampler(1.0), Sampler(1.0, top_k=5), Sampler(presence_penalty=1.0)):
        assert "the sampler needs what the state was not made for" in refused(sampler=sampler)
    unmade = dataclasses.replace(state, prompt_room=None)
    assert "the state has no slots" in refused(state=unmade)
    # Nothing was used up by all that.
    state = generator.insert(params, state, 0, SECOND, sampler=Sampler(1.0, top_k=3))
    state, tokens = generator.decode_n(params, generator.release(state, 1), 2)
    assert (np.asarray(tokens) == NO_TOKEN).tolist() == [[False, True]] * 2
    assert state.seed.dtype == state.step.dtype == jnp.int32
