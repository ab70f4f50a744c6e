"""Between two calls of the step prompts are read for as long as answers may wait, no longer."""

import pytest

from models.config import ModelConfig
from wavejax.engine.batching.pace import Pace, layer_work, reads_whole, seconds_of_layer
from wavejax.engine.batching.slot_reading import Part
from wavejax.engine.batching.turn import read_all, read_some


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Prompt:
    """Units of work, each of which takes its seconds by a fake clock."""

    def __init__(self, clock, kind, units, seconds):
        self.clock, self.kind, self.left, self.seconds = clock, kind, units, seconds
        self.runs = []

    @property
    def done(self):
        return self.left == 0

    def part(self):
        return Part(("enter", self.kind), self.left)

    def run(self, units):
        assert 0 < units <= self.left
        self.left -= units
        self.clock.now += units * self.seconds
        self.runs.append(units)


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.1, 0.2])
def test_no_turn_takes_longer_than_it_may_and_the_time_is_used(seconds):
    clock, pace = Clock(), Pace()
    prompt = Prompt(clock, 1, 1000, seconds)
    turns = []
    while not prompt.done:
        began = clock()
        read_all([prompt], 0.25, pace, clock)
        turns.append(clock() - began)
    assert max(turns) <= 0.25 + 1e-9
    # After what was read to learn, all but less than a unit is used.
    assert min(turns[2:-1]) > 0.25 - seconds - 1e-9
    # By few parts: the chunk is as large as the time allows.
    assert len(prompt.runs) <= len(turns) + 3


def test_a_part_that_never_fits_is_read_all_the_same_one_a_turn():
    clock, pace = Clock(), Pace()
    prompt = Prompt(clock, 1, 5, 0.4)
    assert [read_all([prompt], 0.25, pace, clock) for _ in range(5)] == [1] * 5
    assert prompt.runs == [1] * 5


def test_a_unit_that_turns_slow_counts_at_once():
    clock, pace = Clock(), Pace()
    prompt = Prompt(clock, 1, 1000, 0.001)
    for _ in range(3):
        read_all([prompt], 0.25, pace, clock)
    assert prompt.runs[-1] > 100
    prompt.seconds = 0.01
    read_all([prompt], 0.25, pace, clock)  # nobody knew
    began = clock()
    read_all([prompt], 0.25, pace, clock)
    assert clock() - began <= 0.25


def test_two_prompts_share_a_turn_and_one_has_all_that_the_other_leaves():
    clock, pace = Clock(), Pace()
    long = Prompt(clock, 1, 10**6, 0.001)
    for _ in range(2):
        read_all([long], 0.2, pace, clock)
    short = Prompt(clock, 2, 1000, 0.001)
    for _ in range(2):
        read_all([short, long], 0.2, pace, clock)
    before = short.left, long.left
    read_all([short, long], 0.2, pace, clock)
    shares = before[0] - short.left, before[1] - long.left
    assert shares[0] == pytest.approx(100, abs=2)
    assert shares[1] == pytest.approx(100, abs=2)
    while not short.done:
        read_all([short, long], 0.2, pace, clock)
    before = long.left
    read_all([long, short], 0.2, pace, clock)
    assert before - long.left == pytest.approx(200, abs=2)


def test_who_is_not_first_gets_nothing_where_nothing_fits():
    clock, pace = Clock(), Pace()
    slow, other = Prompt(clock, 1, 9, 0.3), Prompt(clock, 2, 9, 0.3)
    for _ in range(2):
        read_all([slow], 0.2, pace, clock)
        read_all([other], 0.2, pace, clock)
    left = slow.left, other.left
    read_all([slow, other], 0.2, pace, clock)
    read_all([other, slow], 0.2, pace, clock)
    assert (slow.left, other.left) == (left[0] - 1, left[1] - 1)


def test_the_first_run_of_a_program_counts_no_longer_than_to_the_second():
    clock, pace = Clock(), Pace()
    prompt = Prompt(clock, 1, 100, 30.0)
    read_some(prompt, 0.25, pace, clock)
    assert pace.seconds(("enter", 1)) == 30.0  # until it is known better
    prompt.seconds = 0.001
    read_some(prompt, clock() + 0.25, pace, clock)
    assert pace.seconds(("enter", 1)) == pytest.approx(0.001)


def test_a_section_that_was_not_measured_is_guessed_by_the_one_before():
    pace = Pace()
    for _ in range(2):
        pace.note(("attend", 512, 0), 2, 0.2)
    assert pace.seconds(("attend", 512, 1)) == pytest.approx(0.2)
    assert pace.seconds(("attend", 512, 2)) == pytest.approx(0.3)
    pace.note(("attend", 512, 1), 1, 0.15)
    assert pace.seconds(("attend", 512, 1)) == pytest.approx(0.15)
    assert pace.seconds(("attend", 1024, 1)) is None


SMALL = ModelConfig(
    "llama", vocab_size=50, num_layers=2, hidden_size=32, head_dim=8, intermediate_size=48,
    num_heads=4, num_kv_heads=2, max_context=64,
)  # fmt: skip


def test_layers_are_read_whole_if_one_takes_no_longer_than_it_may():
    pace, config = Pace(), SMALL
    assert reads_whole(pace, config, 1024, 0.1)
    assert not reads_whole(pace, config, 1280, 0.1)
    for _ in range(2):
        pace.note(("layer", 512), 1, 0.01)
    assert reads_whole(pace, config, 512, 0.01)
    assert not reads_whole(pace, config, 512, 0.004)
    # By work, which grows faster than the length.
    ratio = layer_work(config, 4096) / layer_work(config, 512)
    assert 8 < ratio < 64
    assert reads_whole(pace, config, 4096, 0.0101 * ratio)
    assert not reads_whole(pace, config, 4096, 0.0099 * ratio)
    assert seconds_of_layer(pace, config, 4096) == pytest.approx(0.01 * ratio)


def test_the_way_that_has_run_is_taken_before_one_that_would_compile():
    pace = Pace()
    for _ in range(2):
        pace.note(("layer", 512), 1, 0.01)
        pace.note(("write", 4096), 1, 0.01)
    # In parts, though a whole layer would be fast enough.
    assert not reads_whole(pace, SMALL, 4096, 100.0)
    assert reads_whole(pace, SMALL, 2048, 100.0)
    # Whole, though it takes longer than it may; not if it takes more than twice as long.
    assert reads_whole(pace, SMALL, 512, 0.006)
    assert not reads_whole(pace, SMALL, 512, 0.004)
    for _ in range(2):
        pace.note(("write", 512), 1, 0.001)
        pace.note(("layer", 4096), 1, 0.1)
    # Both have run.
    assert not reads_whole(pace, SMALL, 512, 0.006)
    assert reads_whole(pace, SMALL, 4096, 0.1)
    # Before anything was measured a run tells too.
    first = Pace()
    first.note(("layer", 8192), 1, 9.0)
    assert reads_whole(first, SMALL, 8192, 0.1)
