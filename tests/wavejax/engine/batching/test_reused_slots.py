"""Prompts that begin with what a free slot still holds go on from there, as `Generator.append`."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.reused_slots import DRAWN, FIRST, NEXT, OTHER, ROOM, ask, request_of
from tests.support.tiny_generator import CONFIG, MODEL, make_params
from tests.wavejax.engine.test_compiled_programs import CompileLog
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.engine.batching import Progress, Request, Room

NAMES = ["dense", *(pytest.param(x, marks=pytest.mark.slow(60)) for x in ("device", "staged"))]
ATTENTIONS = {
    "dense": DenseAttention(),
    "device": WaveAttention(CONFIG, "device"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
}


class Turns:
    """What `Generator` gives a conversation: it reads a prompt, answers, and appends the next."""

    def __init__(self, attention, prompt):
        self._generator, self._params = Generator(MODEL, attention, DRAWN), make_params()
        self._state = self._generator.start(
            self._params, [prompt], 192, samplers=[DRAWN], seed=3, sequences=[0]
        )

    def answer(self, tokens):
        self._state, found = self._generator.decode_n(self._params, self._state, tokens)
        return tuple(np.asarray(found)[:, 0].tolist())

    def go_on(self, tokens):
        state = self._generator.append(self._params, self._state, tokens)
        # Each answer's noise begins anew.
        self._state = dataclasses.replace(state, step=0 * state.step)


@pytest.mark.parametrize("name", NAMES)
def test_a_next_turn_reads_its_own_tokens_alone(name):
    """Three turns, the second over a growth of the index; another answer comes beside them."""
    attention = ATTENTIONS[name]
    engine = make_engine(attention, (ROOM,), reuse_slots=True, steps=4)
    beside = engine.submit(Request(OTHER, 90, DRAWN, 8, stop_tokens=()))
    while engine.stats().running == 0:
        engine.turn()
    turns, prompt = Turns(attention, FIRST), list(FIRST)
    for number, most in enumerate((10, 70, 9)):
        handle = engine.submit(Request(prompt, most, DRAWN, 3, stop_tokens=()))
        while not handle.done:
            engine.turn()
        told = [one.read_tokens for one in handle.events(0) if isinstance(one, Progress)]
        found = handle.result(0)
        assert found.token_ids == turns.answer(most), number
        # Of the answer's tokens all are held; the last one of the prompt is never reused.
        assert found.usage.cached_tokens == (len(prompt) - len(NEXT) if number else 0)
        assert found.usage.prompt_tokens == len(prompt)
        assert told[-1] == len(prompt)
        assert number == 0 or told[0] == len(prompt) - len(NEXT)
        prompt += [*found.token_ids, *NEXT]
        turns.go_on(NEXT)
    run(engine)
    assert beside.result(0).token_ids == Alone(attention, (), 90)(beside.request)[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_answered_after_a_stop_is_cut(name):
    """The device went on after the host saw the stop; the next turn leaves some tokens out too."""
    attention = ATTENTIONS[name]
    turns = Turns(attention, FIRST)
    expected = turns.answer(12)
    stop = next(token for i, token in enumerate(expected) if i > 4 and token not in expected[:i])
    kept = expected.index(stop) - 2
    engine = make_engine(attention, (ROOM,), reuse_slots=True, steps=8)
    first = ask(engine, FIRST, 100, stop_tokens=(stop,))
    assert first.finish_reason == "stop"
    assert first.token_ids == expected[: kept + 3]
    changed = [(token + 1) % 50 for token in expected[kept : kept + 1]]
    rest = [*changed, *NEXT]
    second = ask(engine, [*FIRST, *first.token_ids[:kept], *rest], 9)
    assert second.usage.cached_tokens == len(FIRST) + kept
    turns = Turns(attention, FIRST)
    turns.answer(kept)
    turns.go_on(rest)
    assert second.token_ids == turns.answer(9)


def test_a_next_turn_does_not_wait_for_another_long_prompt(monkeypatch):
    """Of its tokens few are read, so it is as short as a request of these."""
    engine = make_engine(None, (ROOM,), reuse_slots=True, short_tokens=128)
    first = ask(engine, FIRST, 8)
    handles = [
        engine.submit(request_of(prompt, 8))
        for prompt in (OTHER, [*FIRST, *first.token_ids, *NEXT])
    ]
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_read", lambda: None)
        engine.turn()
    # One of each kind is read at a time.
    assert {key: one.answer.number for key, one in engine._scheduler.readings.items()} == {
        False: 1,
        True: 2,
    }
    run(engine)
    other, found = (handle.result(0) for handle in handles)
    assert other.token_ids == Alone(None, (), 8)(handles[0].request)[0]
    assert found.usage.cached_tokens == len(FIRST) + len(first.token_ids)
    # Where nothing of it is held it is as long as it is.
    engine = make_engine(None, (ROOM,), reuse_slots=True, short_tokens=128)
    handles = [engine.submit(request_of(prompt, 8)) for prompt in (OTHER, FIRST)]
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_read", lambda: None)
        engine.turn()
    assert list(engine._scheduler.readings) == [False]
    run(engine)
    assert all(handle.done for handle in handles)


def test_the_same_prompt_again_reads_its_last_token():
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    found = [ask(engine, FIRST, 8) for _ in range(2)]
    assert found[0].token_ids == found[1].token_ids == Alone(None, (), 8)(request_of(FIRST, 8))[0]
    assert [one.usage.cached_tokens for one in found] == [0, len(FIRST) - 1]


def test_unasked_nothing_is_reused():
    engine = make_engine(None, (ROOM,))
    assert [ask(engine, FIRST, 8).usage.cached_tokens for _ in range(2)] == [0, 0]
    assert engine._scheduler.batches[0].ended == {}


def test_an_index_is_not_cut():
    """A prompt that leaves another before its window is read whole, in the same slot or another."""
    attention = WaveAttention(CONFIG, "device")
    engine = make_engine(attention, (ROOM,), reuse_slots=True)
    ask(engine, FIRST, 4)
    early, late = [*FIRST[:250], *NEXT], [*FIRST[:278], *NEXT]
    assert ask(engine, early, 4).usage.cached_tokens == 0
    found = ask(engine, late, 4)
    assert found.usage.cached_tokens == 278
    # With full attention any place will do.
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    ask(engine, FIRST, 4)
    assert ask(engine, early, 4).usage.cached_tokens == 250


def test_less_than_half_is_read_anew():
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    ask(engine, FIRST[:50], 4)
    assert ask(engine, [*FIRST[:50], *OTHER[:52]], 4).usage.cached_tokens == 0
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    ask(engine, FIRST[:50], 4)
    assert ask(engine, [*FIRST[:50], *OTHER[:50]], 4).usage.cached_tokens == 50


def test_without_room_for_the_answer_it_is_read_anew():
    """Of the room after the first prompt 60 tokens are taken; read anew, a prompt has all of it."""
    prompt, wave = FIRST[:150], WaveAttention(CONFIG, "device")
    engine = make_engine(wave, (Room(320, 64, 1),), reuse_slots=True)
    first = ask(engine, prompt, 60)
    longer = [*prompt, *first.token_ids, *NEXT]
    assert ask(engine, longer, 64).usage.cached_tokens == 0
    first = ask(engine, prompt, 60)
    assert ask(engine, longer, 10).usage.cached_tokens == 210


def test_who_is_seated_beside_a_next_turn_has_room_too():
    """The slot of a short first prompt has room for the next turn's answer, for no longer one."""
    attention = WaveAttention(CONFIG, "device")
    engine = make_engine(attention, (Room(320, 64, 2),), reuse_slots=True)
    first = ask(engine, FIRST[:150], 60)
    longer = [*FIRST[:150], *first.token_ids, *NEXT]
    handles = [engine.submit(request_of(longer, most)) for most in (10, 9, 64)]
    run(engine)
    found = [handle.result(0) for handle in handles]
    assert [one.usage.cached_tokens for one in found] == [210, 240, 0]
    assert [one.finish_reason for one in found] == ["length"] * 3
    assert [len(one.token_ids) for one in found] == [10, 9, 64]
    assert found[1].token_ids == found[0].token_ids[:9]


def test_other_prompts_take_the_slots_that_nobody_wants_first():
    engine = make_engine(None, (Room(448, 192, 3),), reuse_slots=True)
    ask(engine, FIRST, 4)
    for prompt in (OTHER, OTHER[1:]):
        ask(engine, prompt, 4)
    assert ask(engine, [*FIRST, *NEXT], 4).usage.cached_tokens == 280
    for prompt in (OTHER[2:], OTHER[3:], OTHER[4:]):  # the last takes the place of who left first
        ask(engine, prompt, 4)
    assert ask(engine, [*FIRST, *NEXT], 4).usage.cached_tokens == 0


def test_a_conversation_keeps_its_slot_while_others_come():
    engine = make_engine(None, (Room(448, 192, 2),), reuse_slots=True)
    prompt = list(FIRST)
    for turn in range(3):
        found = ask(engine, prompt, 4)
        assert found.usage.cached_tokens == (len(prompt) - 30 if turn else 0)
        prompt += [*found.token_ids, *NEXT]
        ask(engine, OTHER[: 100 + turn], 4)


def test_nothing_of_a_request_is_kept_but_its_tokens():
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    request = request_of(FIRST, 4)
    handle = engine.submit(request)
    run(engine)
    handle.result(0)
    alive = weakref.ref(handle)
    channel = weakref.ref(handle._channel)
    del handle, request
    gc.collect()
    assert alive() is None
    assert channel() is None
    assert len(engine._scheduler.batches[0].ended) == 1


@pytest.mark.parametrize("name", ["dense", pytest.param("device", marks=pytest.mark.slow(60))])
def test_after_warming_up_a_next_turn_compiles_nothing(name):
    engine = make_engine(ATTENTIONS[name], (Room(448, 192, 1),), reuse_slots=True)
    engine.warmup((DRAWN,), prompt_tokens=[280], appended=True)
    prompt = list(FIRST)
    with CompileLog() as log:
        for turn in range(3):
            found = ask(engine, prompt, 9)
            assert (found.usage.cached_tokens > 0) == (turn > 0)
            prompt += [*found.token_ids, *NEXT]
    assert not log.names
