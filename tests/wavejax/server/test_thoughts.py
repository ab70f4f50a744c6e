"""Thoughts are told from the answer, wherever the text is cut into pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavejax.server.thoughts import ThoughtSplitter, has_thoughts


def split(pieces: list[str], begun: bool) -> tuple[str, str]:
    """The thoughts and the text of an answer that comes in pieces."""
    splitter = ThoughtSplitter(begun)
    found = [part for piece in pieces for part in splitter.push(piece)]
    found += splitter.end()
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds, reverse=True)  # thoughts first
    assert all(text for _, text in found)
    thought, text = ("".join(text for kind, text in found if kind == one) for one in KINDS)
    return thought, text


KINDS = ("thought", "text")
CASES = {
    "qwen3": ("<think>\nIt is 4.\n\nYes.\n</think>\n\nFour.", False, "It is 4.\n\nYes.", "Four."),
    "no thoughts": ("Four. <think>no</think>", False, "", "Four. <think>no</think>"),
    "empty ones": ("<think>\n\n</think>\n\nFour.", False, "", "Four."),
    "begun in the prompt": ("It is 4.\n</think>\nFour. ", True, "It is 4.", "Four. "),
    "cut within thoughts": ("<think>It is </thin", False, "It is </thin", ""),
    "cut within white space": ("<think> It is \n\n", False, "It is", ""),
    "no text after them": ("<think>a</think>\n", False, "a", ""),
    "cut within the mark": ("\n<thi", False, "", "\n<thi"),
    "like a mark": ("<thanks>", False, "", "<thanks>"),
    "a second one is text": ("<think>a</think>b<think>c", False, "a", "b<think>c"),
    "nothing": ("", False, "", ""),
    "angles within": ("<think>a < b </ c</think>d", False, "a < b </ c", "d"),
}


@pytest.mark.parametrize("name", CASES)
def test_whole_and_character_by_character(name: str) -> None:
    text, begun, thought, answer = CASES[name]
    assert split([text], begun) == (thought, answer)
    assert split(list(text), begun) == (thought, answer)


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 40)))
def test_however_it_is_cut(name: str, cuts: list[int]) -> None:
    text, begun, thought, answer = CASES[name]
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert split(pieces, begun) == (thought, answer)


def test_whose_template_has_them() -> None:
    assert has_thoughts("{% if '</think>' in content %}")
    assert not has_thoughts("{{ messages }}")
    assert not has_thoughts(None)
