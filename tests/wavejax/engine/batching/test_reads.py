"""What usage tells of an answer's reads: what `Generator`'s facts tell of it alone."""

import dataclasses

import jax.numpy as jnp
import pytest

from tests.support.batch_requests import make_engine, run
from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.engine.batching import Request, Room
from wavejax.engine.batching.reads import Reads, summary
from wavejax.store.audit import AuditLog, errors_of

AUDITED = dataclasses.replace(CONFIG, audit=1.0, cache_fraction=0.2)
ROOM, STEPS = Room(prompt_tokens=320, new_tokens=64, slots=2), 6
PLACES = {
    "device": WaveAttention(AUDITED, "device"),
    "host": WaveAttention(AUDITED, "host", "in_place"),
    "staged": WaveAttention(dataclasses.replace(AUDITED, audit=0.0), "host", "staged"),
}


@pytest.mark.parametrize(
    "name", ["device", *(pytest.param(x, marks=pytest.mark.slow(40)) for x in ("host", "staged"))]
)
def test_each_answer_tells_its_own(name):
    """Two side by side and a third in a slot that another left: what `facts` tell of each alone."""
    attention = PLACES[name]
    # By single steps, so that no more are counted than an answer has tokens.
    engine = make_engine(attention, [ROOM], steps=1)
    prompts = make_prompts((300, 270, 290))
    handles = [engine.submit(Request(prompt, STEPS, stop_tokens=())) for prompt in prompts]
    run(engine)
    generator, params = Generator(MODEL, attention), make_params()
    for prompt, handle in zip(prompts, handles, strict=True):
        reads = handle.result(0).usage.reads
        told = summary([reads])
        # The step after an answer's last token is run only if that was not drawn ahead of it.
        heads = MODEL.num_layers * MODEL.num_heads
        steps = STEPS if name == "staged" else told["audited"] // heads
        assert STEPS - steps in (0, 1)
        state = generator.start(params, [prompt], ROOM.new_tokens)
        state, _ = generator.decode_n(params, state, steps)
        facts = generator.facts(state)
        assert told["retrieved"] == pytest.approx(facts.retrieved_share, rel=1e-6)
        if name == "staged":  # of which nothing can be audited
            assert told.keys() == {"retrieved", "hits"}
        else:
            assert told["audited"] == facts.audited == heads * steps
            assert told["error_median"] == pytest.approx(facts.error_median, rel=1e-3)
            assert told["error_99"] == pytest.approx(facts.error_99, rel=1e-3)
        if name == "device":
            assert "hits" not in told
            assert facts.hit_ratio is None
        else:
            assert told["hits"] == pytest.approx(facts.hit_ratio)


def test_full_attention_tells_nothing():
    engine = make_engine(DenseAttention(), [ROOM])
    handle = engine.submit(Request(make_prompts((40,))[0], 2, stop_tokens=()))
    run(engine)
    assert handle.result(0).usage.reads is None


def test_several_answers_are_summed_up():
    one, other = Reads(10, 4, 100.0, (0.1, 0.3)), Reads(30, 30, 300.0, (0.2,))
    assert summary([one]) == {
        "retrieved": 0.1, "hits": 0.4, "audited": 2,
        "error_median": pytest.approx(0.2), "error_99": pytest.approx(0.298),
    }  # fmt: skip
    both = summary([one, other])
    assert (both["retrieved"], both["hits"], both["audited"]) == (0.1, 0.85, 3)
    assert both["error_median"] == pytest.approx(0.2)
    without = summary([one._replace(hits=None), other._replace(errors=()), Reads(0, None, 9.0, ())])
    assert "hits" not in without
    assert summary([Reads(0, 0, 50.0, ())]) == {"retrieved": 0.0}


def test_a_logs_errors_by_sequence():
    """The newest that are kept; those before the first audit are nobody's."""
    log = AuditLog(jnp.array([0.5, 0.25, 9.0]), jnp.array([1, 0, 0], jnp.int32), jnp.int32(2))
    assert errors_of(log, 0).tolist() == [0.25]
    assert errors_of(log, 1).tolist() == [0.5]
    assert errors_of(log, 2).tolist() == []
    assert errors_of(log).tolist() == [0.5, 0.25]
