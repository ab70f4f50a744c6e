"""One request's own things: its end, its errors, log-probabilities, constraints, its reader."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.batch_requests import ROOM, Alone, make_engine, run
from tests.support.tiny_generator import MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, InputError, Sampler
from wavejax.engine.batching import (
    BatchEngine,
    EngineClosed,
    Piece,
    Progress,
    QueueFull,
    Request,
)

PROMPT = make_prompts((5,))[0]
OTHER = make_prompts((60,))[0]


@pytest.fixture(scope="module")
def alone():
    return Alone()


def test_what_cannot_be_is_refused_at_submit_with_both_numbers():
    engine = make_engine()

    def refused(**changes):
        with pytest.raises(InputError) as error:
            engine.submit(dataclasses.replace(Request(PROMPT), **changes))
        return str(error.value)

    assert "the prompt has 129 tokens, and there is room for 128" in refused(prompt=[1] * 129)
    said = refused(max_new_tokens=65)
    assert "`max_new_tokens` is 65" in said
    assert "there is room for 64" in said
    assert "prompt 1 has token 50; the model has 0 to 49" in refused(prompt=[50])
    assert "prompt 1 is empty" in refused(prompt=[])
    assert "`max_new_tokens` is 0" in refused(max_new_tokens=0)
    assert "`logprobs` is 21" in refused(logprobs=21, max_new_tokens=8)
    assert "stop texts need a tokenizer" in refused(stop="a", max_new_tokens=8)
    short = make_engine(max_context=100)
    with pytest.raises(InputError, match=r"99 tokens, 107 with 8 new ones; the context is 100"):
        short.submit(Request([1] * 99, 8))
    stats = engine.stats()
    assert (stats.submitted, stats.refused, stats.waiting) == (0, 7, 0)


def test_a_full_queue_and_a_closed_engine_say_so():
    engine = make_engine(queue_limit=2)
    handles = [engine.submit(Request(PROMPT, 2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait, and 2 may"):
        engine.submit(Request(PROMPT, 2))
    engine.close()
    assert [handle.result(0).finish_reason for handle in handles] == ["interrupted"] * 2
    with pytest.raises(EngineClosed):
        engine.submit(Request(PROMPT, 2))
    with pytest.raises(EngineClosed):
        engine.start()


def test_a_cancelled_or_dropped_request_frees_its_slot_within_one_call(alone):
    engine = make_engine(rooms=[dataclasses.replace(ROOM, slots=1)])
    handles = [engine.submit(Request(PROMPT, 60, seed=i, stop_tokens=())) for i in range(3)]
    while engine.stats().running == 0:
        engine.turn()
    for _ in range(3):  # tokens come a call behind
        engine.turn()
    handles[0].cancel()
    engine.turn()
    assert engine.stats().finished == {"interrupted": 1}
    # Its slot is the next one's in the same turn.
    assert engine.stats().reading + engine.stats().running == 1
    found = handles[0].result(0)
    assert 0 < len(found.token_ids) < 60
    expected = alone(handles[0].request)[0]
    assert found.token_ids[:24] == expected[: len(found.token_ids)]
    engine.turn()
    del handles[1]
    gc.collect()
    engine.turn()
    assert engine.stats().finished == {"interrupted": 2}
    run(engine)
    assert handles[1].result(0).finish_reason == "length"


def test_events_go_to_a_callback_and_one_that_raises_ends_its_request_alone():
    engine, events, order = make_engine(), [], []

    def bad(event):
        order.append(event)
        raise OSError("the reader has gone")

    first = engine.submit(Request(OTHER, 3, stop_tokens=()), events.append)
    second = engine.submit(Request(PROMPT, 9, stop_tokens=()), bad)
    run(engine)
    assert [type(event) for event in events] == [Progress] * 2 + [Piece] * 3
    assert events[1] == Progress(60, 60)
    assert events[-1].finish_reason == "length"
    assert events[-1].usage.total_seconds >= events[-1].usage.first_token_seconds > 0
    assert (first.done, second.done) == (True, True)
    assert len(order) == 1
    assert engine.stats().finished == {"length": 1, "interrupted": 1}


def test_not_finite_logits_end_one_request():
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    tree = make_params()["params"]
    table = tree["embedding"]
    params = {"params": tree | {"embedding": table.at[49].set(np.nan), "unembedding": table + 0.0}}
    engine = BatchEngine(Generator(untied, DenseAttention()), params, [ROOM])
    prompts = [(1, 2, 3), (4, 49, 6), (8, 9)]
    handles = [engine.submit(Request(prompt, 5, stop_tokens=(49,))) for prompt in prompts]
    run(engine)
    found = [handle.result(0) for handle in handles]
    assert (found[1].finish_reason, found[1].token_ids) == ("not finite", ())
    for index in (0, 2):
        generator = Generator(untied, DenseAttention())
        state = generator.start(params, [prompts[index]], 5)
        expected = np.asarray(generator.decode_n(params, state, 5)[1])[:, 0]
        assert list(found[index].token_ids) == expected[: len(found[index].token_ids)].tolist()
        assert found[index].finish_reason in ("length", "stop")


def test_log_probabilities_are_the_models_own(alone):
    """Against float64 softmax of forced logits; the tokens are those of plain steps."""
    engine = make_engine()
    sampler = Sampler(1.2, top_k=5, presence_penalty=0.5)
    watched = engine.submit(Request(PROMPT, 6, sampler, seed=3, stop_tokens=(), logprobs=2))
    plain = engine.submit(Request(OTHER, 6, stop_tokens=()))
    run(engine)
    found = watched.result(0)
    assert found.token_ids == alone(watched.request)[0]
    assert plain.result(0).token_ids == alone(plain.request)[0]
    assert plain.result(0).logprobs is None
    generator = Generator(MODEL, DenseAttention())
    state = generator.start(make_params(), [PROMPT], 6)
    _, logits = generator.force(make_params(), state, jnp.asarray(found.token_ids)[:, None])
    logits = np.asarray(logits, np.float64)[:, 0]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(found.logprobs) == 6
    for row, token, told in zip(expected, found.token_ids, found.logprobs, strict=True):
        assert told.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.argsort(-row)[:2]
        assert [token for token, _ in told.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in told.top], row[best], atol=1e-4)


class Even:
    """Allows even tokens alone; fails after some."""

    def __init__(self, most=99):
        self.accepted, self.most = [], most

    def allowed(self):
        if len(self.accepted) == self.most:
            raise RuntimeError("no way out of the grammar")
        return np.arange(MODEL.vocab_size) % 2 == 0

    def accept(self, token):
        self.accepted.append(token)


def test_a_constraint_says_what_may_come_and_its_errors_are_its_requests_own(alone):
    engine = make_engine()
    rules = [Even(), Even(), Even(3)]
    samplers = [Sampler(), Sampler(1.0), Sampler()]
    handles = [
        engine.submit(Request(PROMPT, 8, sampler, stop_tokens=(), constraint=rule))
        for rule, sampler in zip(rules, samplers, strict=True)
    ]
    free = engine.submit(Request(OTHER, 8, stop_tokens=()))
    run(engine)
    for handle, rule in zip(handles[:2], rules[:2], strict=True):
        found = handle.result(0)
        assert list(found.token_ids) == rule.accepted
        assert len(rule.accepted) == 8
        assert not (np.asarray(rule.accepted) % 2).any()
    with pytest.raises(RuntimeError, match="no way out of the grammar"):
        handles[2].result(0)
    assert len(rules[2].accepted) == 3
    assert free.result(0).token_ids == alone(free.request)[0]
    assert engine.stats().finished == {"length": 3, "error": 1}
    # Greedy among what is allowed: the first token is the best even one.
    generator = Generator(MODEL, DenseAttention())
    logits = np.asarray(generator.start(make_params(), [PROMPT], 8).logits)[0]
    assert rules[0].accepted[0] == 2 * int(logits[::2].argmax())


def test_tokens_in_use_are_those_of_prompts_and_answers():
    engine, pieces = make_engine(steps=1), []
    handle = engine.submit(Request(PROMPT, 6, stop_tokens=()), pieces.append)
    assert engine.stats().usage == 0
    shares = []
    while engine.turn():
        stats, came = engine.stats(), sum(isinstance(one, Piece) for one in pieces)
        assert stats.token_room == ROOM.slots * (ROOM.prompt_tokens + ROOM.new_tokens)
        assert stats.held_tokens == len(PROMPT) + came
        shares.append(stats.usage)
    assert len(set(shares)) > 3
    assert shares == sorted(shares)
    assert max(shares) <= (len(PROMPT) + 6) / stats.token_room
    assert engine.stats().held_tokens == 0
    assert handle.done


def test_a_prompt_that_fails_ends_its_own_request(monkeypatch, alone):
    engine = make_engine()
    running = engine.submit(Request(PROMPT, 20, stop_tokens=()))
    while engine.stats().running == 0:
        engine.turn()
    with monkeypatch.context() as patch:
        patch.setattr("wavejax.engine.batching.reading.commit", None)
        failing = engine.submit(Request(OTHER, 4))
        engine.turn()
    with pytest.raises(TypeError):
        failing.result(0)
    after = engine.submit(Request(OTHER, 4, stop_tokens=()))
    run(engine)
    assert running.result(0).token_ids == alone(running.request)[0]
    assert after.result(0).token_ids == alone(after.request)[0]


def test_it_works_in_its_own_thread_and_drains(alone):
    with make_engine() as engine:
        handles = [engine.submit(Request(PROMPT, 9, seed=i)) for i in range(7)]
        pieces = list(handles[0])
        assert engine.alive
        assert engine.drain(timeout=300)
        with pytest.raises(EngineClosed, match="drains"):
            engine.submit(Request(PROMPT, 9))
    assert not engine.alive
    assert engine.failure is None
    assert pieces[-1].finish_reason in ("stop", "length")
    for handle in handles:
        found = handle.result(0)
        assert (found.token_ids, found.finish_reason) == alone(handle.request)
    assert not any(batch.state for batch in engine._scheduler.batches)


def test_an_engine_that_fails_ends_all_requests_and_says_why(monkeypatch):
    engine = make_engine()
    handle = engine.submit(Request(PROMPT, 9))
    monkeypatch.setattr(engine._scheduler, "turn", lambda: jax.device_put(object()))
    engine.start()
    with pytest.raises(TypeError):
        handle.result(300)
    engine.close()
    assert isinstance(engine.failure, TypeError)
    with pytest.raises(EngineClosed):
        engine.submit(Request(PROMPT, 9))
