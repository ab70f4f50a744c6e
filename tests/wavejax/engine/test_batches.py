"""A batch changes nothing: each prompt gets what it gets alone, whatever stands beside it."""

import dataclasses

import numpy as np
import pytest

from tests.support.tiny_generator import (
    ATTENTIONS,
    GREEDY,
    MODEL,
    SAMPLED,
    make_params,
    make_prompts,
)
from wavejax import Generator, WaveAttention

# It says of users' programs which give the same tokens.
pytestmark = pytest.mark.optimised

# The second one's index grows after two tokens.
PROMPTS, STEPS = make_prompts((5, 79, 318)), 24
SAMPLERS = [SAMPLED, GREEDY, SAMPLED]  # drawn tokens tell more of the logits than greedy ones


def attentions():
    wave = ATTENTIONS["wave"]
    return {
        "dense": ATTENTIONS["dense"],
        "host": wave,
        "device": WaveAttention(wave.config, "device"),
        "staged": dataclasses.replace(wave, store="host", fetch="staged"),
    }


def answers(generator, prompts, **settings):
    """`[batch]` lists of tokens."""
    state = generator.start(make_params(), prompts, STEPS, **settings)
    return np.asarray(generator.decode_n(make_params(), state, STEPS)[1]).T.tolist()


@pytest.mark.slow(60)
@pytest.mark.parametrize("name", ["dense", "host", "device", "staged"])
def test_each_prompt_gets_what_it_gets_alone(name):
    generator = Generator(MODEL, attentions()[name])
    together = answers(generator, PROMPTS, seed=2, samplers=SAMPLERS)
    alone = [
        answers(generator, [prompt], seed=2, sequences=[i], samplers=[SAMPLERS[i]])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    # In another order, each with its own noise.
    order = [2, 0, 1]
    samplers = [SAMPLERS[i] for i in order]
    moved = answers(
        generator, [PROMPTS[i] for i in order], seed=2, sequences=order, samplers=samplers
    )
    assert moved == [alone[i] for i in order]


@pytest.mark.slow
def test_equal_prompts_get_different_samples_and_the_seed_fixes_all():
    generator = Generator(MODEL, ATTENTIONS["dense"], SAMPLED)
    prompt = PROMPTS[0]
    three = answers(generator, [prompt] * 3, seed=4)
    assert len(set(map(tuple, three))) == 3
    assert answers(generator, [prompt] * 3, seed=4) == three
    assert answers(generator, [prompt], seed=4) == three[:1]
    assert answers(generator, [prompt] * 2, seed=4, sequences=[2, 0]) == [three[2], three[0]]
    assert answers(generator, [prompt] * 2, seed=4, sequences=[1, 1]) == [three[1], three[1]]
    other = answers(generator, [prompt] * 3, seed=5)
    assert not set(map(tuple, other)) & set(map(tuple, three))
    # Without randomness there is nothing to differ in.
    greedy = answers(Generator(MODEL, ATTENTIONS["dense"], GREEDY), [prompt] * 3)
    assert greedy == [greedy[0]] * 3
