"""The line: first come, first served; short requests pass, but not for ever."""

import numpy as np
import pytest

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.handle import Channel
from wavejax.engine.batching.line import Line
from wavejax.engine.batching.request import QueueFull, Request


def make_line(kinds, limit=64, most_passes=2):
    """A line of requests: "s" short, "L" long."""
    line = Line(limit, most_passes)
    for number, kind in enumerate(kinds):
        line.push(make_answer(number, kind == "s"))
    return line


def make_answer(number, short):
    request = Request(np.asarray([number], np.int32))
    return Answer(number, request, Channel(), 0.0, short)


def take(line, blocked):
    """The number of who goes, where some kinds are blocked: "L": "room"."""
    found = line.take(lambda answer: blocked.get("s" if answer.short else "L", ("slot",)))
    return None if found is None else found[0].number


def test_first_come_first_served_where_all_can_go():
    line = make_line("LsLs")
    assert [take(line, {}) for _ in range(5)] == [0, 1, 2, 3, None]


def test_short_ones_pass_a_long_one_that_waits_for_a_slot_a_few_times():
    line = make_line("LLssss")
    blocked = {"L": "room"}
    assert [take(line, blocked) for _ in range(3)] == [2, 3, None]
    # Who came first goes first once it can; then the second long one may be passed too.
    assert take(line, {}) == 0
    assert [take(line, blocked) for _ in range(3)] == [4, 5, None]
    assert take(line, {}) == 1


def test_who_waits_for_another_prompt_to_be_read_may_be_passed_any_number_of_times():
    line = make_line("Lssss")
    assert [take(line, {"L": "reading"}) for _ in range(5)] == [1, 2, 3, 4, None]
    assert take(line, {}) == 0


def test_long_ones_pass_nobody():
    line = make_line("sLsL")
    assert take(line, {"s": "room"}) is None
    assert [take(line, {}) for _ in range(4)] == [0, 1, 2, 3]


def test_a_short_one_that_has_no_room_is_passed_by_others_as_often():
    line = make_line("ssss")
    smallest = {0}

    def place(answer):
        return "room" if answer.number in smallest else ("slot",)

    assert [line.take(place)[0].number for _ in range(2)] == [1, 2]
    assert line.take(place) is None  # the last one too must wait for the first
    smallest.clear()
    assert line.take(place)[0].number == 0


def test_no_passes_are_strictly_first_come_first_served():
    line = make_line("Lss", most_passes=0)
    assert take(line, {"L": "room"}) is None


def test_a_full_line_says_both_numbers_and_counts_no_cancelled_ones():
    line = make_line("ss", limit=2)
    with pytest.raises(QueueFull, match="2 requests wait, and 2 may"):
        line.push(make_answer(2, True))
    next(iter(line)).channel.cancel()
    line.push(make_answer(3, True))
    assert len(line) == 3
