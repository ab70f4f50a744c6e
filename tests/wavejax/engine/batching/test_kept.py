"""Requests whose prompts begin with a kept document: they get what the document's run gives."""

import dataclasses

import numpy as np
import pytest

import wavejax
from models.errors import InputError
from tests.support.batch_requests import Alone, make_engine, run
from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, Sampler, WaveAttention
from wavejax.engine.batching import Progress, Request, Room

ROOM = Room(prompt_tokens=448, new_tokens=192, slots=3)
WHOLE, OTHER, LONG = make_prompts((400, 60, 300))
DRAWN = Sampler(0.8)


def keep(folder, attention):
    """A document of a whole prompt, and the generator that read it."""
    generator, params = Generator(MODEL, attention), make_params()
    state = generator.start(params, [WHOLE], 1)
    given = {"generator": generator, "params": params}
    wavejax.save_document(state, folder, token_ids=WHOLE, **given)
    return generator, wavejax.load_document(folder, **given)


def by_document(generator, document, prompts, samplers, steps):
    """What the document's own run of some prompts gives each of them."""
    params = make_params()
    state = document.start(generator, steps, 3, params=params, prompts=prompts, samplers=samplers)
    # Only the state's settings say how each is drawn.
    generator = dataclasses.replace(generator, sampler=DRAWN)
    return np.asarray(generator.decode_n(params, state, steps)[1]).T.tolist()


@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(x, marks=pytest.mark.slow(60)) for x in ("device", "staged"))],
)
def test_a_kept_prompt_gives_its_documents_tokens_beside_others(name, tmp_path):
    """Whole, cut, and without a rest; while an answer comes that began before and goes on after."""
    attention = {
        "dense": DenseAttention(),
        "device": WaveAttention(CONFIG, "device"),
        "staged": WaveAttention(CONFIG, "host", "staged"),
    }[name]
    generator, document = keep(tmp_path / "d", attention)
    engine = make_engine(attention, (ROOM,), steps=4)
    first = engine.submit(Request(LONG, 100, DRAWN, seed=5, stop_tokens=()))
    while engine.stats().running == 0:
        engine.turn()
    prompts = [[*WHOLE, *OTHER], [*WHOLE[:276], *OTHER], list(WHOLE)]
    samplers = [Sampler(), DRAWN, Sampler()]
    handles = [
        engine.submit(
            Request(prompt, 10, sampler, 3, sequence=number, stop_tokens=(), kept=document)
        )
        for number, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True))
    ]
    run(engine)
    results = [handle.result(0) for handle in handles]
    assert [one.usage.cached_tokens for one in results] == [400, 276, 400]
    assert [one.usage.prompt_tokens for one in results] == [460, 336, 400]
    expected = by_document(generator, document, prompts, samplers, 10)
    assert [list(one.token_ids) for one in results] == expected
    alone = Alone(attention, (), 100)
    assert first.result(0).token_ids == alone(first.request)[0]
    assert first.result(0).usage.cached_tokens == 0


def test_what_is_reused_counts_as_read(tmp_path):
    _, document = keep(tmp_path / "d", DenseAttention())
    engine = make_engine(None, (ROOM,))
    told = []
    handle = engine.submit(Request([*WHOLE, *OTHER], 2, stop_tokens=(), kept=document), told.append)
    run(engine)
    assert handle.done
    progress = [event.read_tokens for event in told if isinstance(event, Progress)]
    assert progress == [400, 460]


def test_a_kept_prompt_needs_less_room_for_prompts_and_more_for_answers(tmp_path):
    _, document = keep(tmp_path / "d", DenseAttention())
    engine = make_engine(None, (ROOM,))
    prompt = [*WHOLE, *OTHER, *OTHER]  # of more tokens than the room has for prompts
    assert not ROOM.holds(len(prompt), 1)
    taken = engine.submit(Request(prompt, 72, stop_tokens=(), kept=document))
    with pytest.raises(InputError, match="after 400 kept tokens, 120 more and 73 new ones"):
        engine.submit(Request(prompt, 73, kept=document))
    run(engine)
    assert len(taken.result(0).token_ids) == 72


def test_a_damaged_document_ends_its_own_request_alone(tmp_path):
    _, document = keep(tmp_path / "d", DenseAttention())
    engine = make_engine(None, (ROOM,), steps=4)
    running = engine.submit(Request(LONG, 30, stop_tokens=()))
    while engine.stats().running == 0:
        engine.turn()
    file = document.folder.arrays["values/1"].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    failing = engine.submit(Request([*WHOLE, *OTHER], 4, kept=document))
    run(engine)
    with pytest.raises(InputError, match="checksum differs"):
        failing.result(0)
    alone = Alone(None, (), 30)
    assert running.result(0).token_ids == alone(running.request)[0]
    after = engine.submit(Request(LONG, 5, stop_tokens=()))
    run(engine)
    assert after.result(0).token_ids == alone(after.request)[0]
    assert engine.stats().finished == {"length": 2, "error": 1}
