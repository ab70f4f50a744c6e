"""Requests that join and leave get the tokens that they get alone, whatever else goes on."""

import dataclasses

import numpy as np
import pytest

from tests.support.batch_requests import SAMPLERS, Alone, make_engine, make_request, run
from tests.support.tiny_generator import CONFIG, MODEL, make_prompts
from wavejax import DenseAttention, Sampler, WaveAttention
from wavejax.engine.batching import Request, Room
from wavejax.engine.batching.reading import Reading
from wavejax.engine.batching.scheduler import Scheduler

LENGTHS = (1, 3, 5, 60, 127)


def arrivals(engine, rng, requests, cancelled=0.2):
    """Submits at random moments, cancels some; returns the handles of all."""
    waiting, handles = list(requests), []
    while waiting or engine.turn():
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                handles.append(engine.submit(waiting.pop(0)))
        if handles and rng.random() < cancelled:
            handles[int(rng.integers(len(handles)))].cancel()
        engine.turn()
    return handles


def check(handles, alone):
    """Every answer is what its request gets alone, or the beginning of it if it was cancelled."""
    seen = set()
    for handle in handles:
        found = handle.result(0)
        tokens, reason = alone(handle.request)
        if found.finish_reason == "interrupted":
            assert found.token_ids == tokens[: len(found.token_ids)]
        else:
            assert (found.token_ids, found.finish_reason) == (tokens, reason)
        assert found.usage.prompt_tokens == len(handle.request.prompt)
        assert found.usage.completion_tokens == len(found.token_ids)
        seen.add(found.finish_reason)
    return seen


def test_every_request_gets_what_it_gets_alone():
    rng, engine, alone = np.random.default_rng(0), make_engine(queue_limit=99), Alone()
    requests = [make_request(rng, LENGTHS, SAMPLERS) for _ in range(40)]
    handles = arrivals(engine, rng, requests)
    assert len(handles) == 40
    assert check(handles, alone) == {"stop", "length", "interrupted"}
    stats = engine.stats()
    assert stats.submitted == 40 == sum(stats.finished.values())
    assert stats.unfinished == stats.waiting + stats.reading + stats.running == 0
    assert stats.generated_tokens == sum(len(handle.result().token_ids) for handle in handles)


class InParts:
    """Reads prompts by blocks of tokens, with calls of the step between any two parts."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("wavejax.engine.batching.scheduler.reads_whole", lambda *_: False)
        return self

    def __exit__(self, *_):
        self.patch.undo()


@pytest.mark.slow(60)
@pytest.mark.parametrize("store", ["device", "host", "staged", "dense"])
def test_prompts_read_in_parts_among_running_answers_give_the_same(store):
    """Of wave attention: indexes that grow, prompts in the index, slots with caches."""
    attention = DenseAttention()
    if store != "dense":
        fetch = {"host": "in_place", "staged": "staged"}.get(store)
        attention = WaveAttention(CONFIG, "device" if store == "device" else "host", fetch)
    rng = np.random.default_rng(1)
    # Nothing fits the time: each turn reads one unit of one prompt.
    engine = make_engine(attention, [Room(320, 128, 2)], max_stall_ms=1e-3, queue_limit=99)
    requests = [make_request(rng, (262, 318, 5), SAMPLERS[:2], most=90) for _ in range(10)]
    # Two that run long, for an index to grow while others are read.
    requests[0] = Request(make_prompts((262,))[0], 90, stop_tokens=())
    requests[5] = Request(make_prompts((318,))[0], 90, Sampler(1.1), stop_tokens=())
    with InParts():
        handles = arrivals(engine, rng, requests, cancelled=0.02)
    assert engine.stats().read_parts > 60
    assert "length" in check(handles, Alone(attention, most=90))


def test_layers_that_fit_the_time_are_read_without_a_wait_between(monkeypatch):
    engine, runs = make_engine(rooms=[Room(160, 64, 1)], max_stall_ms=60_000), []
    engine.warmup(prompt_tokens=[100])
    run_units = Reading.run
    monkeypatch.setattr(
        Reading, "run", lambda self, n: (runs.append((self.part().key[0], n)), run_units(self, n))
    )
    request = Request(make_prompts((100,))[0], 5, stop_tokens=())
    handle = engine.submit(request)
    run(engine)
    assert runs == [("begin", 1), ("layer", MODEL.num_layers), ("end", 1)]
    assert handle.result(0).token_ids == Alone()(request)[0]


def test_calls_of_the_step_come_between_the_parts_of_a_prompt(monkeypatch):
    engine = make_engine(rooms=[Room(512, 64, 2)], max_stall_ms=1e-3)
    order = []
    decode, read = Scheduler._decode, Scheduler._read

    def decode_too(self):
        before = self.counts["decode_calls"]
        decode(self)
        order.extend("d" * (self.counts["decode_calls"] - before))

    def read_too(self):
        before = self.counts["read_parts"]
        read(self)
        order.extend("r" * (self.counts["read_parts"] - before))

    monkeypatch.setattr(Scheduler, "_decode", decode_too)
    monkeypatch.setattr(Scheduler, "_read", read_too)
    first = engine.submit(Request(make_prompts((5,))[0], 60, stop_tokens=()))
    while not engine.stats().running:
        engine.turn()
    order.clear()
    with InParts():
        second = engine.submit(Request(make_prompts((500,))[0], 2, stop_tokens=()))
        run(engine)
    # Two layers of four blocks: 1 + 2 x (4 + 4 + 1) + 1 parts.
    assert order.count("r") == 20
    assert "rr" not in "".join(order)
    assert "rdr" in "".join(order)
    alone = Alone(most=60)
    assert first.result(0).token_ids == alone(first.request)[0]
    assert second.result(0).token_ids == alone(second.request)[0]


@dataclasses.dataclass(frozen=True)
class Own(DenseAttention):
    """A class of the user's: nobody knows whether a slot of it can be parked."""


def test_an_attention_of_ones_own_reads_its_prompts_at_once():
    engine, alone = make_engine(Own()), Alone(Own())
    first = engine.submit(Request(make_prompts((5,))[0], 20, stop_tokens=()))
    while not engine.stats().running:
        engine.turn()
    before = engine.stats().read_parts
    second = engine.submit(Request(make_prompts((60,))[0], 6, Sampler(1.1), stop_tokens=()))
    run(engine)
    assert engine.stats().read_parts == before + 1
    for handle in (first, second):
        assert handle.result(0).token_ids == alone(handle.request)[0]
