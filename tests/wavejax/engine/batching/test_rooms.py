"""Rooms: many lengths share programs; memory that is not there is waited for, or refused."""

import jax
import jax.numpy as jnp
import pytest

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.tiny_generator import MODEL, make_prompts
from tests.wavejax.engine.test_compiled_programs import CompileLog
from wavejax import DenseAttention, InputError, Sampler
from wavejax.engine import compiled
from wavejax.engine.batching import EngineClosed, Request, Room
from wavejax.planning.free_memory import FreeMemory
from wavejax.planning.memory import memory_need
from wavejax.planning.rooms import plan_rooms
from wavejax.store.shape import CacheShape

GIB = 2**30


def test_after_warming_up_no_length_and_no_number_compiles_anything():
    engine = make_engine(rooms=[Room(160, 64, 2)], max_stall_ms=60_000)
    before = compiled.decode_n._cache_size(), compiled.prefill_layer._cache_size()
    calls = []
    engine.warmup([Sampler(), Sampler(1.0)], progress=lambda *call: calls.append(call))
    # Two padded lengths, 128 and 160; two kinds of drawing.
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert compiled.decode_n._cache_size() == before[0] + 2
    assert compiled.prefill_layer._cache_size() == before[1] + 2
    lengths = (1, 2, 17, 64, 100, 127, 128, 129, 140, 159, 160)
    with CompileLog() as log:
        handles = [
            engine.submit(Request(prompt, 3 + number, Sampler(0.5 * (number % 3)), stop_tokens=()))
            for number, prompt in enumerate(make_prompts(lengths))
        ]
        run(engine)
    assert not log.names
    alone = Alone()
    for handle in handles[::4]:
        assert handle.result(0).token_ids == alone(handle.request)[0]
    engine.start()
    with pytest.raises(EngineClosed, match="before `start`"):
        engine.warmup()
    engine.close()


def test_after_warming_up_a_change_of_pace_compiles_nothing(monkeypatch):
    """However fast layers turn out to be: whole and in parts are programs of their own."""
    monkeypatch.setattr("wavejax.engine.batching.pace.WHOLE_UNKNOWN", 100)  # all are long
    engine = make_engine(rooms=[Room(320, 64, 2)], max_stall_ms=1e-3)
    engine.warmup(prompt_tokens=[100, 320])
    requests, found = [Request(x, 3, stop_tokens=()) for x in make_prompts((300, 90))], []
    with CompileLog() as log:
        for stall in (60.0, 1e-6):
            engine._scheduler.stall = stall
            handles = [engine.submit(request) for request in requests]
            run(engine)
            found.append([handle.result(0).token_ids for handle in handles])
    assert not log.names
    assert found[0] == found[1] == [Alone()(request)[0] for request in requests]


def test_a_room_waits_for_the_memory_of_another_until_it_is_idle():
    small, large = Room(128, 64, 3, bytes=40), Room(160, 64, 1, bytes=80)
    engine = make_engine(rooms=[large, small], memory=100)
    first = engine.submit(Request(make_prompts((5,))[0], 8, stop_tokens=()))
    second = engine.submit(Request(make_prompts((150,))[0], 4, stop_tokens=()))
    third = engine.submit(Request(make_prompts((60,))[0], 4, stop_tokens=()))
    most = 0
    while engine.turn():
        held = [batch.room for batch in engine._scheduler.batches if batch.state]
        most = max(most, sum(room.bytes for room in held))
        if not second.done and engine.stats().reading + engine.stats().running > 1:
            assert held == [small]  # the third passes the second, into the small room
    assert most == 80
    alone = Alone()
    for handle in (first, second, third):
        assert handle.result(0).token_ids == alone(handle.request)[0]


def test_what_fits_no_memory_is_refused_at_submit_with_both_numbers():
    rooms = [Room(128, 64, 2, bytes=GIB), Room(1024, 64, 2, bytes=5 * GIB)]
    engine = make_engine(rooms=rooms, memory=3 * GIB)
    with pytest.raises(InputError) as error:
        engine.submit(Request([1] * 800, 8))
    assert "needs a room of 5.00 GiB, and there are 3.00 GiB for rooms" in str(error.value)
    engine.submit(Request([1] * 100, 8))


def test_a_room_of_no_slots_is_refused():
    with pytest.raises(InputError, match="a room's slots is 0"):
        Room(128, 64, 0)
    with pytest.raises(InputError, match="there is no room"):
        make_engine(rooms=[])


def plan(free, rooms, **options):
    memory = FreeMemory(None, free) if isinstance(free, int) else free
    return plan_rooms(MODEL, DenseAttention(), rooms, "float32", free=memory, **options)


def test_the_planner_gives_a_room_as_many_slots_as_fit():
    room = Room(4096, 256, 8)
    whole = memory_need(MODEL, DenseAttention(), 8, 4096, 256, "float32")
    roomy = plan(4 * whole.device, [room])
    assert [one.slots for one in roomy.rooms] == [8]
    assert roomy.rooms[0].bytes == whole.state <= roomy.memory
    tight = plan(whole.device - 1, [room])
    assert 0 < tight.rooms[0].slots < 8
    need = memory_need(MODEL, DenseAttention(), tight.rooms[0].slots, 4096, 256, "float32")
    assert need.device <= whole.device - 1
    assert tight.rooms[0].bytes == need.state


def test_a_room_in_int8_has_more_slots():
    rounded, rooms = DenseAttention(row_dtype="int8"), [Room(4096, 256, 99)]
    free = FreeMemory(None, memory_need(MODEL, DenseAttention(), 8, 4096, 256, "float32").device)
    found = plan_rooms(MODEL, rounded, rooms, "float32", free=free)
    assert 2 * plan(free, rooms).rooms[0].slots < found.rooms[0].slots < 99
    state = rounded.init_state(CacheShape.of(MODEL), found.rooms[0].slots, 4096, 256, jnp.float32)
    assert found.rooms[0].bytes == sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_room_too_large_for_the_memory_stays_and_its_requests_are_refused():
    one = memory_need(MODEL, DenseAttention(), 1, 4096, 256, "float32")
    found = plan(one.device * 2, [Room(2**16, 256, 4), Room(4096, 256, 4)])
    small, large = found.rooms
    assert small.bytes <= found.memory < large.bytes
    assert large.slots == 1


def test_a_small_room_has_no_more_slots_than_fit_beside_what_a_large_one_takes():
    large = memory_need(MODEL, DenseAttention(), 1, 2**15, 256, "float32")
    found = plan(
        large.device + 4 * 2**15 * 4 * (32 + 32), [Room(2**15, 256, 4), Room(4096, 256, 99)]
    )
    assert all(room.bytes <= found.memory for room in found.rooms)
    assert found.rooms[1].slots == 1
    assert 1 < found.rooms[0].slots < 99


def test_nothing_that_fits_is_an_error_of_one_line():
    with pytest.raises(InputError, match="not enough memory"):
        plan(1000, [Room(4096, 256, 4)])
