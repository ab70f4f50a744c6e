"""Stop strings against a search of the whole text, however it is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InputError
from models.text.stop_strings import StopStrings


def shown_until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


texts = st.text("ab\n", max_size=12)


@given(st.lists(texts, max_size=8), st.lists(texts.filter(bool), max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown, found = "", False
    for piece in pieces:
        text, found = stream.push(piece)
        shown += text
        if found:
            break
    expected = shown_until_stop("".join(pieces), stops)
    assert (shown + stream.flush(), found) == expected
    assert stream.flush() == ""


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["\nUser:", "</s>"])
    assert stream.push("Yes.") == ("Yes.", False)
    assert stream.push("\n") == ("", False)
    assert stream.push("Use it") == ("\nUse it", False)
    assert stream.push("\nUs") == ("", False)
    assert stream.push("er: more") == ("", True)
    assert stream.push("and more") == ("", True)
    assert stream.flush() == ""


@pytest.mark.parametrize("cuts", list(itertools.product([1, 2, 3], repeat=3)))
def test_stop_strings_that_overlap(cuts: tuple[int, ...]) -> None:
    text, pieces, at = "xbcdy", [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    stream = StopStrings(["bcd", "c"])
    assert "".join(stream.push(piece)[0] for piece in [*pieces, text[at:]]) == "xb"


def test_no_stop_strings() -> None:
    stream = StopStrings([])
    assert stream.push("a") == ("a", False)
    assert stream.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""]])
def test_empty_ones_are_refused(stops: list[str]) -> None:
    with pytest.raises(InputError, match="none of them empty"):
        StopStrings(stops)
