"""Tokens that were recorded (scripts/record_generations.py) come again, every one of them."""

import json
from pathlib import Path

import pytest

from tests.support.generation_cases import CASES, TINY
from wavejax.engine.generator import NO_TOKEN

# It says of users' programs which tokens they give.
pytestmark = pytest.mark.optimised

FILE = Path(__file__).parents[2] / "references" / "generations.json"
RECORDED = json.loads(FILE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_those_recorded(name):
    assert CASES[name]() == RECORDED[name]


def test_the_record_is_whole_and_says_something():
    assert list(RECORDED) == list(CASES)
    answers = [tuple(map(tuple, answer)) for answer in RECORDED.values()]
    # Samplers differ; so do sequences; wave attention's answers may be full attention's.
    assert len(set(answers)) > len(TINY) // 2
    assert all(len(set(answer)) == len(answer) for answer in answers)
    # Stop tokens are met, and not by all.
    ended = [sequence[-1] == NO_TOKEN for answer in answers for sequence in answer]
    assert any(ended)
    assert not all(ended)
