"""Sampling settings are arrays of the state: no number compiles anything anew, each row has its."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import ATTENTIONS, GREEDY, MODEL, make_params, make_prompts
from tests.wavejax.engine.test_compiled_programs import CompileLog
from wavejax import Generator, InputError, Sampler
from wavejax.engine.sampling import SamplingSettings, draw_tokens, settings_of, step_keys
from wavejax.engine.state_checks import as_samplers

# It looks at compiled programs.
pytestmark = pytest.mark.optimised

STEPS = 12
PROMPTS = make_prompts((5, 40, 5, 70, 40, 20))
# Every way of drawing there is, side by side.
SAMPLERS = [
    GREEDY,
    Sampler(temperature=1.2, min_p=0.01),
    Sampler(temperature=1.0, top_p=0.8),
    Sampler(temperature=1.5, top_k=3),
    Sampler(repetition_penalty=1.5),
    Sampler(1.3, 20, 0.9, 0.02, 1.2, 0.3, 0.2),
]


def answers(generator, prompts, **given):
    state = generator.start(make_params(), prompts, STEPS, **given)
    return np.asarray(generator.decode_n(make_params(), state, STEPS)[1])


@pytest.mark.slow
def test_each_sequence_of_a_batch_is_drawn_by_its_own_settings():
    generator = Generator(MODEL, ATTENTIONS["dense"])
    together = answers(generator, PROMPTS, seed=3, samplers=SAMPLERS)
    assert len({tuple(tokens) for tokens in together.T}) == len(PROMPTS)
    for i, sampler in enumerate(SAMPLERS):
        alone = Generator(MODEL, ATTENTIONS["dense"], sampler)
        found = answers(alone, PROMPTS[i : i + 1], seed=3, sequences=[i])
        np.testing.assert_array_equal(found[:, 0], together[:, i], err_msg=str(sampler))


FORMS = {
    "temperature": (Sampler(0.7), Sampler(1.3), Sampler(0.9, min_p=0.1)),
    "ranks": (Sampler(0.7, top_p=0.9), Sampler(1.1, top_p=0.5, min_p=0.2)),
    "few ranks": (Sampler(0.7, top_k=5), Sampler(1.1, top_k=8, top_p=0.7)),
    "penalties": (
        Sampler(repetition_penalty=1.3),
        Sampler(presence_penalty=0.4),
        Sampler(repetition_penalty=0.8, frequency_penalty=-0.2),
    ),
    "all": (Sampler(1.0, 9, 0.9, 0.1, 1.1), Sampler(0.6, 16, 0.7, 0.0, 1.0, 0.5, 0.5)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["dense", pytest.param("staged", marks=pytest.mark.slow)])
def test_other_settings_and_seeds_compile_nothing(attention, form, attention_of):
    first, *others = FORMS[form]
    answers(Generator(MODEL, attention_of(attention), first), PROMPTS[:2], seed=1)
    with CompileLog() as log:
        for seed, sampler in enumerate(others, 5):
            answers(Generator(MODEL, attention_of(attention), sampler), PROMPTS[:2], seed=seed)
    assert not log.names


@pytest.fixture
def attention_of():
    """Attentions by name, staged rows too."""
    from wavejax import WaveAttention

    staged = WaveAttention(ATTENTIONS["wave"].config, "host", "staged")
    return {"dense": ATTENTIONS["dense"], "staged": staged}.__getitem__


def test_what_a_step_is_compiled_for():
    assert settings_of([GREEDY] * 2, 50) == SamplingSettings()
    plain = settings_of([Sampler(2.0)], 50)
    assert plain.inverse_temperature.tolist() == [0.5]
    assert (plain.ranks, plain.penalties) == (None, None)
    for most, width in [(1, 1), (5, 8), (8, 8), (33, 50), (70, 50)]:
        ranked = settings_of([Sampler(1.0, top_k=most), GREEDY], 50)
        assert ranked.ranks.tolist() == list(range(width))
        assert ranked.top_k.tolist() == [min(most, 50), width]
        assert ranked.ranked is None
    assert settings_of([Sampler(1.0, top_p=0.5)], 50).ranks.shape == (50,)
    both = settings_of([Sampler(1.0, top_k=3), Sampler(1.0)], 50)
    assert both.ranked.tolist() == [True, False]
    later = settings_of([GREEDY], 50, [Sampler(1.0, top_k=3, presence_penalty=1.0)])
    assert (later.inverse_temperature.tolist(), later.ranks.shape) == ([0], (4,))
    assert later.penalties.presence.tolist() == [0]


def test_a_rows_draw_does_not_depend_on_how_many_are_ranked():
    """As a sampler of few ranks draws beside one that ranks all."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.tile(rng.normal(size=300) * 3, (2, 1)), jnp.float32)
    few, many = Sampler(1.3, top_k=7, top_p=0.9), Sampler(0.9, top_p=0.95)
    for step in range(30):
        keys = step_keys(0, step, jnp.arange(2))
        together = draw_tokens(settings_of([few, many], 300), logits, keys)
        assert together.tolist() == [
            few.sample(logits[:1], keys[:1]).item(),
            many.sample(logits[1:], keys[1:]).item(),
        ]


def test_a_state_that_was_not_started_for_the_sampler_is_refused():
    params, prompts = make_params(), PROMPTS[:1]
    greedy, ranked = (Generator(MODEL, ATTENTIONS["dense"], s) for s in (GREEDY, SAMPLERS[2]))
    state = greedy.start(params, prompts, STEPS)
    with pytest.raises(InputError, match="this state was not started for that"):
        ranked.decode_n(params, state, 1)
    # What a generator starts it can go on with, whatever samplers were given.
    state = ranked.start(params, prompts, STEPS, samplers=[GREEDY])
    _, tokens = ranked.decode_n(params, state, STEPS)
    np.testing.assert_array_equal(tokens, answers(greedy, prompts))


@pytest.mark.parametrize(
    "samplers, said",
    [
        (3, "samplers is of type int; give a list of Samplers, one a prompt"),
        ([0.7], "a sampler is of type float; give a Sampler"),
        ([GREEDY, GREEDY], "samplers has 2 for 1 prompts; give one each"),
    ],
)
def test_other_samplers_are_refused(samplers, said):
    with pytest.raises(InputError) as error:
        as_samplers(samplers, 1, GREEDY)
    assert str(error.value) == said
