"""Slots that go on from what they hold: what failed, or is not finite, is not gone on from."""

import numpy as np
import pytest

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.reused_slots import DRAWN, FIRST, NEXT, OTHER, ROOM, ask, request_of
from wavejax.attention import appended
from wavejax.engine import appending
from wavejax.engine.batching import Request, Room


def test_what_is_not_finite_is_not_gone_on_from():
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    params = engine._params["params"]
    embedding = params["embedding"]
    nan = embedding.at[FIRST[-1]].set(np.nan)
    for batch in engine._scheduler.batches:
        batch.params = {"params": params | {"embedding": nan}}
    assert ask(engine, FIRST, 4).finish_reason == "not finite"
    for batch in engine._scheduler.batches:
        batch.params = {"params": params}
    found = ask(engine, FIRST, 4)
    assert found.usage.cached_tokens == 0
    assert found.token_ids == Alone(None, (), 4)(request_of(FIRST, 4))[0]


def test_what_failed_gives_its_slot_first():
    """Two slots: of a conversation, and of an answer that failed later."""
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    found = ask(engine, FIRST, 4)

    class Failing:
        def allowed(self):
            raise MemoryError("none left")

        def accept(self, token):
            """Never comes."""

    handle = engine.submit(Request(OTHER, 4, DRAWN, 3, constraint=Failing()))
    run(engine)
    with pytest.raises(MemoryError):
        handle.result(0)
    ask(engine, OTHER[1:], 4)
    again = ask(engine, [*FIRST, *found.token_ids, *NEXT], 4)
    assert again.usage.cached_tokens == len(FIRST) + 4


def test_a_state_that_a_failed_piece_took_is_given_up(monkeypatch):
    engine = make_engine(None, (Room(448, 192, 2),), reuse_slots=True)
    found = ask(engine, FIRST, 4)
    append_some = appending.append_some

    def fail(*given, free):
        append_some(*given, free=free)
        raise MemoryError("none left")

    monkeypatch.setattr(appending, "append_some", fail)
    handle = engine.submit(request_of([*FIRST, *NEXT], 4))
    run(engine)
    monkeypatch.undo()
    with pytest.raises(MemoryError, match="none left"):
        handle.result(0)
    again = ask(engine, FIRST, 4)
    assert again.usage.cached_tokens == 0
    assert again.token_ids == found.token_ids


def test_a_cut_that_fails_ends_its_own_answer_alone(monkeypatch):
    engine = make_engine(None, (ROOM,), reuse_slots=True)
    ask(engine, FIRST, 4)

    def fail(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(appended, "cut", fail)
    handle = engine.submit(request_of([*FIRST, *NEXT], 4))
    run(engine)
    with pytest.raises(MemoryError, match="none left"):
        handle.result(0)
    assert ask(engine, OTHER, 4).token_ids == Alone(None, (), 4)(request_of(OTHER, 4))[0]
    assert engine.stats().finished == {"length": 2, "error": 1}
