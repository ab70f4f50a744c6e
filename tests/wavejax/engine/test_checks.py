"""What callers give: what is taken, in which form, and what is refused, in one line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from tests.support.tiny_generator import ATTENTIONS, GREEDY, MODEL, make_params, make_prompts
from wavejax import Generator, Sampler, WaveConfig
from wavejax.engine import state_checks
from wavejax.engine.checks import as_prompts, as_sequences, as_stop_tokens, as_tokens, whole_number

VOCAB = 50


def refused(call, *arguments, **settings):
    """The line that refuses it."""
    with pytest.raises(InputError) as error:
        call(*arguments, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2, 49], [0]],
        ((1, 2, 49), (0,)),
        iter([[1, 2, 49], iter([0])]),
        (prompt for prompt in (range(1, 3), [0])),
        [np.array([1, 2, 49]), np.array([0], np.uint8)],
        [jnp.array([1, 2, 49]), [np.int64(0)]],
        np.array([[1, 2], [3, 4]]),
        jnp.array([[1, 2], [3, 4]]),
        [[jnp.int32(1), 2]],
    ],
)
def test_prompts_of_any_kind_are_taken(prompts):
    found = as_prompts(prompts, VOCAB)
    assert all(prompt.dtype == np.int32 and prompt.ndim == 1 for prompt in found)
    assert found[0][0] == 1


@pytest.mark.parametrize(
    "prompts, said",
    [
        ("hello", "prompts is a text, 'hello'; token ids are wanted"),
        (["hello"], "prompt 1 is a text, 'hello'; token ids are wanted"),
        ([[1], b"x"], "prompt 2 is a text"),
        ([["a", "b"]], "prompt 1 has 'a'; tokens are whole numbers from 0 to 49"),
        ([1, 2, 3], "prompts is one list of numbers; it must be a list of prompts: give [prompt]"),
        (np.array([1, 2]), "prompts is one list of numbers"),
        (5, "prompts is 5; it must be a list of prompts"),
        (None, "prompts is None; it must be a list of prompts"),
        ([None], "prompt 1 is None; it must be a list of token ids"),
        ([[1.5, 2.7]], "prompt 1 has 1.5; tokens are whole numbers from 0 to 49"),
        ([[1, 2.0]], "prompt 1 has 1.0; tokens are whole numbers"),
        ([np.array([1.0, 2.0])], "prompt 1 has 1.0; tokens are whole numbers"),
        ([[True, False]], "prompt 1 has True; tokens are whole numbers"),
        ([[1, None]], "prompt 1 has None; tokens are whole numbers"),
        ([[1], [2**70]], f"prompt 2 has {2**70}; tokens are whole numbers"),
        ([[1], [[2, 3]]], "prompt 2 is [[2, 3]]; it must be a list of token ids"),
        ([[[2], [3, 4]]], "prompt 1 is [[2], [3, 4]]; it must be a list of token ids"),
        ([[1], [2, 50]], "prompt 2 has token 50; the model has 0 to 49"),
        ([[1], []], "prompt 2 is empty: give at least one token"),
        ([], "there is no prompt: give at least one"),
        (iter(()), "there is no prompt: give at least one"),
    ],
)
def test_other_prompts_are_named(prompts, said):
    assert refused(as_prompts, prompts, VOCAB).startswith(said)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)])
def test_a_whole_number_of_any_kind_is_pythons_int(value):
    found = whole_number("steps", value, 0)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize("value", [None, 1.5, 2.0, "3", True, np.True_, [3], np.array([3]), -1, 8])
def test_what_is_no_whole_number_is_refused(value):
    shown = value.item() if isinstance(value, np.generic) else value
    said = f"steps is {shown!r}; it must be a whole number from 0 to 7"
    assert refused(whole_number, "steps", value, 0, 7) == said


def test_a_traced_number_is_refused():
    @jax.jit
    def of(steps):
        return whole_number("steps", steps, 0)

    assert "must be a whole number" in refused(of, 3)


@pytest.mark.parametrize("stops", [[2, 9], {9, 2}, (9, 2, 2), np.array([2, 9]), iter([9, 2])])
def test_stop_tokens_of_any_kind_make_equal_generators(stops):
    generator = Generator(MODEL, ATTENTIONS["dense"], GREEDY, (2, 9))
    assert as_stop_tokens(stops, VOCAB) == generator.stop_tokens == (2, 9)
    if isinstance(stops, tuple):
        other = Generator(MODEL, ATTENTIONS["dense"], GREEDY, stops)
        assert (other, hash(other)) == (generator, hash(generator))


@pytest.mark.parametrize(
    "stops, said",
    [
        ((2**40,), f"a stop token is {2**40}; it must be a whole number from 0 to 49"),
        ((-1,), "a stop token is -1; it must be a whole number from 0 to 49"),
        ([1.5], "a stop token is 1.5; it must be a whole number"),
        (["</s>"], "a stop token is '</s>'; it must be a whole number"),
        ("</s>", "stop_tokens is '</s>'; it must be a list of token ids"),
        (None, "stop_tokens is None; it must be a list of token ids"),
        (2, "stop_tokens is 2; it must be a list of token ids"),
    ],
)
def test_other_stop_tokens_are_named(stops, said):
    assert refused(as_stop_tokens, stops, VOCAB).startswith(said)


@pytest.mark.parametrize("numbers", [[3, 0], np.array([3, 0]), iter([3, 0])])
def test_sequences_are_numbered_as_told(numbers):
    assert as_sequences(numbers, 2).tolist() == [3, 0]
    assert as_sequences(None, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "numbers, said",
    [
        ([1], "sequences has 1 numbers for 2 prompts"),
        ([1, -1], "a sequence's number is -1"),
        ([1, 2**31], "a sequence's number is 2147483648"),
        ([1, 0.5], "a sequence's number is 0.5"),
        (7, "sequences is 7; it must be a list"),
    ],
)
def test_other_numbers_of_sequences_are_named(numbers, said):
    assert refused(as_sequences, numbers, 2).startswith(said)


def test_tokens_to_run_are_whole_numbers_of_the_model():
    for tokens in ([[1, 2]], np.array([[1, 2]]), jnp.array([[1, 2]]), [[-1, 49]]):
        found = as_tokens(tokens, True, 2, VOCAB)
        assert (found.shape, found.dtype) == ((1, 2), jnp.int32)
    for tokens, said in [
        ([[1.5, 2]], "the tokens to run are 1.5; they must be whole numbers"),
        (jnp.array([[1.5, 2]]), "the tokens to run are these; they must be whole numbers"),
        ([[1, 2, 3]], "the tokens to run have the shape [1, 3]; it must be [steps, batch], of 2"),
        ([1, 2], "the tokens to run have the shape [2]; it must be [steps, batch], of 2"),
        ([[1, 50]], "token 50 is to be run; the model has 0 to 49"),
        ("ab", "the tokens to run are"),
        (None, "the tokens to run are"),
    ]:
        assert refused(as_tokens, tokens, True, 2, VOCAB).startswith(said)
    assert as_tokens([1, 2], False, 2, VOCAB).tolist() == [1, 2]


def start(*arguments, **settings):
    """`Generator.start` without the tests' type checker, which would be the first to object."""
    generator = Generator(MODEL, ATTENTIONS["dense"], GREEDY)
    return inspect.unwrap(Generator.start)(generator, *arguments, **settings)


def test_nothing_is_read_before_all_is_checked(monkeypatch):
    monkeypatch.setattr(Generator, "_start", None)  # nothing to call
    params, prompts = make_params(), make_prompts([20])
    stacks = {"params": {**params["params"], "embedding": np.zeros((VOCAB, 32))}}
    other = {"params": {**params["params"], "embedding": jnp.zeros((60, 32))}}
    for arguments, said in [
        ((params, "text", 4), "prompts is a text"),
        ((params, prompts, 4, None), "seed is None; it must be a whole number"),
        ((params, prompts, 4, 1.5), "seed is 1.5"),
        ((params, prompts, 4.0), "max_new_tokens is 4.0"),
        ((params, prompts, None), "max_new_tokens is None"),
        ((params, prompts, 2**31), "max_new_tokens is 2147483648"),
        ((params["params"], prompts, 4), "params is no tree of parameters"),
        ((None, prompts, 4), "params is no tree of parameters"),
        ((stacks, prompts, 4), "params are float64; they must be one of float32"),
        ((other, prompts, 4), "params have an embedding of [60, 32]; the model's is [50, 32]"),
    ]:
        assert refused(start, *arguments).startswith(said)
    assert "sequences has 2" in refused(start, params, prompts, 4, sequences=[0, 1])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention": WaveConfig()}, "`attention` is of type WaveConfig; give an Attention"),
        ({"sampler": 0.7}, "`sampler` is of type float; give a Sampler"),
        ({"model_config": "llama"}, "`model_config` is of type str; give a ModelConfig"),
        ({"stop_tokens": (99,)}, "a stop token is 99; it must be a whole number from 0 to 49"),
    ],
)
def test_a_generator_of_other_parts_is_refused(changes, said):
    generator = object.__new__(Generator)
    parts = {"model_config": MODEL, "attention": ATTENTIONS["dense"], "sampler": GREEDY}
    parts["stop_tokens"] = ()
    for name, value in (parts | changes).items():
        object.__setattr__(generator, name, value)
    assert refused(generator.__post_init__).startswith(said)


@pytest.mark.parametrize("attention", ["dense", "wave", "staged"])
def test_a_state_is_used_once(attention):
    generator = Generator(MODEL, attention_of(attention), GREEDY)
    params = make_params()
    state = generator.start(params, iter(make_prompts([20])), np.int64(4), np.int32(1))
    newest, tokens = generator.decode_n(params, state, np.int64(2))
    assert tokens.shape == (2, 1)
    used = "this state was given to an earlier call, which used it up"
    for call in (
        lambda: generator.decode_n(params, state, 1),
        lambda: generator.stream(params, state, 1),
        lambda: generator.force(params, state, jnp.zeros((1, 1), jnp.int32)),
        lambda: generator.feed(params, state, jnp.zeros(1, jnp.int32)),
        lambda: generator.facts(state),
    ):
        assert refused(call).startswith(used)
    # What the call returned is good.
    generator.feed(params, newest, jnp.zeros(1, jnp.int32))


def attention_of(name):
    import dataclasses

    wave = ATTENTIONS["wave"]
    staged = dataclasses.replace(wave, store="host", fetch="staged")
    return {**ATTENTIONS, "staged": staged}[name]


def test_a_state_of_another_generator_is_refused():
    dense, wave, staged = (
        Generator(MODEL, attention_of(name)) for name in ("dense", "wave", "staged")
    )
    params = make_params()
    state = dense.start(params, make_prompts([20]), 4)
    for other in (wave, staged):
        assert "go on with the generator that started it" in refused(
            other.decode_n, params, state, 1
        )
    penalised = Generator(MODEL, ATTENTIONS["dense"], Sampler(presence_penalty=1.0))
    assert "need counts that this state has not" in refused(penalised.decode_n, params, state, 1)
    both = dense.decode_n(params, state, 1)
    assert "the state is of type tuple" in refused(
        state_checks.check_state, dense.engine, GREEDY, both
    )
