"""An answer's first token is drawn before its step runs: nobody waits for the step."""

import numpy as np
import pytest

from tests.support.batch_requests import SAMPLERS, Alone, make_engine, run
from tests.support.tiny_generator import CONFIG, make_prompts
from wavejax import Sampler, WaveAttention
from wavejax.engine.batching import Request
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.slot_reading import SlotReading
from wavejax.engine.compiled import CompiledEngine
from wavejax.engine.staged import StagedEngine

PROMPTS = make_prompts((40, 60, 20))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_comes_before_the_step_and_is_the_one_that_is_fed(sampler, monkeypatch):
    engine, came, steps = make_engine(), [], []
    step = CompiledEngine.decode_n

    def late_step(self, params, state, count, first=None):
        steps.append((len(came), None if first is None else np.asarray(first)))
        return step(self, params, state, count, first)

    monkeypatch.setattr(CompiledEngine, "decode_n", late_step)
    request = Request(PROMPTS[0], 5, sampler=sampler, seed=3, stop_tokens=())
    handle = engine.submit(request, came.append)
    run(engine)
    del handle
    tokens = [event.token_id for event in came if hasattr(event, "token_id")]
    assert tuple(tokens[:5]) == Alone(stop_tokens=())(request)[0]
    before_first, given = steps[0]
    assert [event.token_id for event in came[:before_first] if hasattr(event, "token_id")] == [
        tokens[0]
    ]
    assert given[0] == tokens[0]


@pytest.fixture
def behind(monkeypatch):
    """Of each draw, whether it was sent within a part of a prompt that is timed."""
    timed, found = [], []
    first_tokens, read = CompiledEngine.first_tokens, SlotReading.run

    def noted(self, state):
        found.append(bool(timed))
        return first_tokens(self, state)

    def reading(self, units):
        timed.append(units)
        read(self, units)
        timed.clear()

    monkeypatch.setattr(CompiledEngine, "first_tokens", noted)
    monkeypatch.setattr(SlotReading, "run", reading)
    return found


@pytest.mark.parametrize(
    "prompts, last", [([0], True), ([0, 1], True), ([0, 0], False)], ids=["one", "two", "the same"]
)
def test_it_is_drawn_once_behind_the_last_prompt(prompts, last, behind):
    """Not if another is to be seated beside it, which wants another draw."""
    engine = make_engine(WaveAttention(CONFIG, "device"))
    alone = Alone(WaveAttention(CONFIG, "device"), stop_tokens=())
    for expected in (False, last):  # the first one compiles
        requests = [Request(PROMPTS[i], 4, stop_tokens=()) for i in prompts]
        handles = [engine.submit(request) for request in requests]
        run(engine)
        for request, handle in zip(requests, handles, strict=True):
            assert tuple(handle.result(0).token_ids) == alone(request)[0]
        assert behind == [expected]
        behind.clear()


def test_what_compiles_the_draw_is_not_timed_with_the_prompt(behind):
    """A sampler that draws at random is a program of its own, also after greedy requests."""
    engine = make_engine()
    for sampler in (Sampler(), Sampler(0.7), Sampler(0.7), Sampler()):
        handle = engine.submit(Request(PROMPTS[0], 2, sampler=sampler, stop_tokens=()))
        run(engine)
        assert len(handle.result(0).token_ids) == 2
    assert behind == [False, False, True, True]


def test_a_draw_that_fails_behind_a_prompt_ends_its_own_answer_alone(monkeypatch):
    engine = make_engine()
    handle = engine.submit(Request(PROMPTS[0], 4, stop_tokens=()))
    run(engine)
    assert handle.result(0).finish_reason == "length"
    first_tokens = CompiledEngine.first_tokens

    def fail(*_):
        monkeypatch.setattr(CompiledEngine, "first_tokens", first_tokens)
        raise MemoryError("none left")

    monkeypatch.setattr(CompiledEngine, "first_tokens", fail)
    handles = [engine.submit(Request(PROMPTS[1], 4, stop_tokens=()))]
    run(engine)
    handles += [engine.submit(Request(PROMPTS[2], 4, stop_tokens=()))]
    run(engine)
    with pytest.raises(MemoryError, match="none left"):
        handles[0].result(0)
    expected = Alone(stop_tokens=())(Request(PROMPTS[2], 4, stop_tokens=()))[0]
    assert tuple(handles[1].result(0).token_ids) == expected
    assert engine.stats().finished == {"length": 2, "error": 1}


def test_no_step_runs_for_an_answer_of_one_token():
    engine = make_engine()
    requests = [Request(prompt, 1, stop_tokens=()) for prompt in PROMPTS]
    handles = [engine.submit(request) for request in requests]
    run(engine)
    for request, handle in zip(requests, handles, strict=True):
        assert tuple(handle.result(0).token_ids) == Alone(stop_tokens=())(request)[0]
    assert engine.stats().decode_calls == 0


def test_beside_an_answer_that_runs_tokens_come_in_order():
    """The second joins while the first one's tokens are still to be handed out."""
    engine = make_engine(steps=8)
    requests = [Request(prompt, 20, stop_tokens=()) for prompt in PROMPTS]
    handles = [engine.submit(requests[0])]
    for _ in range(4):
        engine.turn()
    handles += [engine.submit(request) for request in requests[1:]]
    run(engine)
    for request, handle in zip(requests, handles, strict=True):
        assert tuple(handle.result(0).token_ids) == Alone(stop_tokens=())(request)[0]


def test_an_answer_that_ends_ahead_of_a_step_that_fails_is_counted(monkeypatch):
    engine = make_engine()
    short, long = Request(PROMPTS[0], 1, stop_tokens=()), Request(PROMPTS[1], 5, stop_tokens=())

    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(CompiledEngine, "decode_n", fail)
    handles = [engine.submit(short), engine.submit(long)]
    run(engine)
    assert handles[0].result(0).finish_reason == "length"
    with pytest.raises(RuntimeError, match="the device is gone"):
        handles[1].result(0)
    stats = engine.stats()
    assert stats.running == 0
    assert stats.finished == {"length": 1, "error": 1}


@pytest.mark.parametrize("name", ["compiled", "staged"])
def test_a_call_is_timed_from_before_it_is_made(name, monkeypatch):
    """A staged step works in Python: what it takes passes before its call returns."""
    attention = None if name == "compiled" else WaveAttention(CONFIG, "host", "staged")
    clock, made, noted = [0.0], [], []
    engine = make_engine(attention, clock=lambda: clock[0], steps=1)
    kind = CompiledEngine if name == "compiled" else StagedEngine
    step, collect = kind.decode_n, Batch.collect

    def slow(self, *given):
        made.append(clock[0])
        clock[0] += 7.0
        return step(self, *given)

    def note(self, now):
        noted.append(self.calls[0].at)
        return collect(self, now)

    monkeypatch.setattr(kind, "decode_n", slow)
    monkeypatch.setattr(Batch, "collect", note)
    handle = engine.submit(Request(PROMPTS[0], 6, stop_tokens=()))
    run(engine)
    assert len(handle.result(0).token_ids) == 6
    assert made == noted
    assert len(made) >= 5
