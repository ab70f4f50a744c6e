"""Requests with tolerances of their own, side by side: each as alone, and what is told of them."""

import dataclasses

import numpy as np
import pytest

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.tiny_generator import CONFIG, make_prompts
from wavejax import DenseAttention, InputError, WaveAttention
from wavejax.engine.batching import Request, Room

BOUNDED = dataclasses.replace(CONFIG, tolerance=0.5, tolerance_draws=64, tolerance_cap=4)
ROOM = Room(prompt_tokens=320, new_tokens=64, slots=2)


def attention(tolerance):
    return WaveAttention(dataclasses.replace(BOUNDED, tolerance=tolerance), "device")


@pytest.mark.slow(45)
def test_each_request_has_its_own():
    """None is the engine's, 0 none at all; the tokens are those of a generator with that one."""
    # By single steps, so that no more are counted than an answer has tokens, however fast it goes.
    engine = make_engine(attention(0.5), [ROOM], queue_limit=9, steps=1)
    prompts = make_prompts((300, 280, 300, 300, 260))
    given = (None, 0.0, 1.0, 0.01, 0)
    handles = [
        engine.submit(Request(prompt, max_new_tokens=10, tolerance=tolerance, stop_tokens=()))
        for prompt, tolerance in zip(prompts, given, strict=True)
    ]
    run(engine)
    found = [handle.result(0) for handle in handles]
    for one, tolerance, handle in zip(found, given, handles, strict=True):
        alone = Alone(attention(0.5 if tolerance is None else tolerance), most=10)
        assert one.token_ids == alone(handle.request)[0]
        met = one.usage.tolerance
        if tolerance == 0:
            assert met is None
        else:
            assert 0 <= met.more <= met.within <= 1
            assert met.computed == 0
    # The wider a tolerance, the more heads are within it.
    within = {
        tolerance: one.usage.tolerance.within
        for one, tolerance in zip(found, given, strict=True)
        if tolerance != 0
    }
    assert within[0.01] < within[None] < within[1.0], within


def test_an_answer_that_a_stop_token_ends_tells_its_own():
    """Also of a slot that another request took before; by exact computation all is within."""
    exact = dataclasses.replace(BOUNDED, exact_fallback=True)
    engine = make_engine(WaveAttention(exact, "device"), [dataclasses.replace(ROOM, slots=1)])
    prompt = make_prompts((300,))[0]
    first, second = (
        engine.submit(Request(prompt, max_new_tokens=20, stop_tokens=range(25), tolerance=one))
        for one in (0.5, 1e-6)
    )
    run(engine)
    first, second = first.result(0), second.result(0)
    assert "stop" in (first.finish_reason, second.finish_reason)
    assert first.usage.tolerance.computed < 0.9
    assert second.usage.tolerance.within == 1
    assert second.usage.tolerance.computed > 0.9


@pytest.mark.parametrize(
    ("held", "tolerance", "said"),
    [
        (DenseAttention(), 0.1, "the engine has none"),
        (WaveAttention(CONFIG), 0.1, "the engine has none"),
        (attention(0.1), -1.0, "`tolerance` is -1.0; it must be from 0, for none, to 1"),
        (attention(0.1), np.nan, "`tolerance` is nan"),
        (attention(0.1), 1.5, "`tolerance` is 1.5"),
        (attention(0.1), True, "`tolerance` is True"),
    ],
)
def test_what_is_none_is_refused(held, tolerance, said):
    engine = make_engine(held)
    with pytest.raises(InputError, match=said):
        engine.submit(Request([1, 2], max_new_tokens=2, tolerance=tolerance))


def test_without_one_nothing_is_told():
    engine = make_engine(WaveAttention(CONFIG, "device"))
    handle = engine.submit(Request([1, 2], max_new_tokens=2, stop_tokens=()))
    run(engine)
    assert handle.result(0).usage.tolerance is None
