"""How samples are cut to a length."""

import dataclasses

import pytest

from models.errors import InputError
from wavejax.evaluation import samples
from wavejax.evaluation.samples import Draft, DraftedTask, Material, Turn


@dataclasses.dataclass(frozen=True)
class Lines(DraftedTask):
    """Its samples have so many lines of 10 tokens each."""

    new_tokens = 10

    def step(self, length):
        return 25

    def draft(self, amount, length, rng, material):
        return Draft((Turn("x" * amount, ""),), ("x",))


class TenTokens(Material):
    """No tokenizer and no prose: a letter is ten tokens."""

    def encode(self, turns):
        return [0] * (10 * len(turns[0].message))


@pytest.mark.parametrize("length, lines", [(450, 44), (449, 42), (300, 28), (1000, 44)])
def test_a_sample_of_few_lines_is_shrunk_by_less_than_the_step(length, lines, monkeypatch):
    """A whole step less would be under the least: RULER's uuid needles at 4,096 tokens."""
    material = object.__new__(TenTokens)
    # What was found to fit, as if this sample's lines were longer.
    monkeypatch.setattr(samples, "_amount", lambda *_: 44)
    assert len(Lines().sample(material, length, 0, 0).tokens) == 10 * lines


def test_a_sample_of_many_lines_is_shrunk_by_the_step(monkeypatch):
    monkeypatch.setattr(samples, "_amount", lambda *_: 90)
    tokens = Lines().sample(object.__new__(TenTokens), 900, 0, 0).tokens
    assert len(tokens) == 10 * 65


def test_a_sample_is_never_under_the_least(monkeypatch):
    monkeypatch.setattr(samples, "_amount", lambda *_: 44)
    with pytest.raises(InputError, match="no sample of 200 tokens"):
        Lines().sample(object.__new__(TenTokens), 200, 0, 0)
