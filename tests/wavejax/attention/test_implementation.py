"""An attention's own `implementation` reaches every op that a prompt and a step call."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import pallas_kernels as ops
from models.errors import InputError
from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention, explain, use_implementation

WAVE_OPS = {
    *("score_clusters", "select_clusters", "score_tokens", "select_tokens"),
    *("attend_zones", "merge_states", "build_clusters", "encode_tokens", "append_rows"),
}
# Of staged rows none is appended by an op: the host keeps them.
CASES = [
    (WaveAttention(CONFIG, "device", implementation="xla"), WAVE_OPS),
    (WaveAttention(CONFIG, "host", "staged", implementation="xla"), WAVE_OPS - {"append_rows"}),
    (DenseAttention(implementation="xla"), {"attend_dense"}),
]


@pytest.fixture(autouse=True)
def nothing_chosen():
    ops.forget()
    yield
    ops.forget()


@pytest.mark.parametrize(("attention", "expected"), CASES, ids=["wave", "staged", "dense"])
def test_it_reaches_every_op_and_wins_over_the_context(attention, expected):
    """On a CPU the kernels asked for around it could not run."""
    generator, params = Generator(MODEL, attention), make_params()
    with use_implementation("triton"):
        state = generator.start(params, make_prompts([200]), max_new_tokens=2)
        _, tokens = generator.decode_n(params, state, 2)
    assert (np.asarray(tokens) >= 0).all()
    told = explain()
    assert {choice.op for choice in told} == expected
    by = f"asked for by {type(attention).__name__}.implementation"
    assert {(choice.implementation, choice.reason) for choice in told} == {("xla", by)}


def test_without_one_the_context_holds():
    generator, params = Generator(MODEL, WaveAttention(CONFIG, "device")), make_params()
    with use_implementation("triton"), pytest.raises((ValueError, NotImplementedError)):
        generator.start(params, make_prompts([200]), max_new_tokens=2)


@pytest.mark.parametrize("kind", [WaveAttention, DenseAttention])
def test_a_wrong_name_is_an_input_error(kind):
    # Tests check the types of fields before the class does.
    with pytest.raises((InputError, TypeCheckError), match="cuda"):
        kind(implementation="cuda")
