"""An answer's first token is drawn before its step runs: nobody waits for the step."""

import numpy as np
import pytest

from tests.support.batch_requests import ROOM, SAMPLERS, Alone, make_engine, run
from tests.support.tiny_generator import make_prompts
from wavejax.engine.batching import Request
from wavejax.engine.compiled import CompiledEngine

PROMPTS = make_prompts((40, 60, 20))


@pytest.mark.parametrize("sampler", SAMPLERS[:4])
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


def test_no_step_runs_for_an_answer_of_one_token():
    engine = make_engine()
    requests = [Request(prompt, 1, stop_tokens=()) for prompt in PROMPTS]
    handles = [engine.submit(request) for request in requests]
    run(engine)
    for request, handle in zip(requests, handles, strict=True):
        assert tuple(handle.result(0).token_ids) == Alone(stop_tokens=())(request)[0]
    assert engine.stats().decode_calls == 0
    assert ROOM.slots == len(requests)


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
