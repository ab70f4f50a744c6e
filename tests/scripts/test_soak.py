"""A small soak: pieces give what one run gives, memory stays flat; and faults would be found."""

import numpy as np
import pytest

from tests.support.scripts import load_script
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import Generator, WaveAttention

# It runs longer than it compiles, and its bits are those of users.
pytestmark = pytest.mark.optimised

script = load_script("soak")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["host", "device"])
def test_pieces_and_memory_over_many_growths(store):
    steps, pieces = 400, (100, 7)
    generator = Generator(MODEL, WaveAttention(CONFIG, store), GREEDY)
    prompts = make_prompts((5, 262, 300, 318))
    runs = [script.soak(generator, make_params(), prompts, steps, piece) for piece in pieces]
    for tokens, looks in runs:
        assert tokens.shape == (steps, 4)
        assert len(looks) >= script.LOOKS - 6  # the piece of 100 looks four times
        assert [one.steps for one in looks] == sorted(one.steps for one in looks)
    assert steps // CONFIG.growth_tokens >= 6
    assert script.faults(pieces, runs) == []


def test_what_differs_or_grows_is_named():
    tokens = np.zeros((8, 2), int)
    other = tokens.copy()
    other[5, 1] = 3
    flat = [script.Look(1, 10, 10, 10), script.Look(8, 10, 10 + script.SLACK, 10)]
    grown = [script.Look(1, 10, 10, 10), script.Look(8, 11, 11 + script.SLACK, 2010)]
    assert script.faults((4, 2), [(tokens, flat), (tokens, flat)]) == []
    found = script.faults((4, 2), [(tokens, flat), (other, grown)])
    assert found[0] == (
        "pieces of 2: 1 tokens differ from pieces of 4, first at step 5 of sequence 1"
    )
    assert [line.split(" memory")[0] for line in found[1:]] == [
        "pieces of 2: device", "pieces of 2: process", "pieces of 2: arrays",
    ]  # fmt: skip
