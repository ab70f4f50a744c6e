"""Several answers to one prompt: it is read once, and each answer is what it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, Sampler, WaveAttention, WaveConfig
from wavejax._pytree import logical_axes
from wavejax.engine.batching import Piece, Progress, Request, Room, sharing
from wavejax.engine.batching.reading import Reading
from wavejax.engine.batching.sharing import copy_slot
from wavejax.store.shape import CacheShape

ROOM = Room(prompt_tokens=448, new_tokens=192, slots=3)
PROMPT, OTHER = make_prompts((400, 300))
DRAWN = Sampler(0.8)
INT8 = WaveConfig(**vars(CONFIG) | {"row_dtype": "int8"})
ATTENTIONS = {
    "dense": DenseAttention(),
    "dense in int8": DenseAttention(row_dtype="int8"),
    "device": WaveAttention(CONFIG, "device"),
    "int8": WaveAttention(INT8, "device"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
}


def samples(count, prompt=PROMPT, most=8):
    return [Request(prompt, most, DRAWN, 4, sequence=i, stop_tokens=()) for i in range(count)]


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "dense in int8",
        *(pytest.param(x, marks=pytest.mark.slow(30)) for x in ("device", "int8", "staged")),
    ],
)
def test_samples_of_a_prompt_read_it_once(name, monkeypatch):
    """Four of three slots; then the same prompt again, which nobody holds any more."""
    attention, begun, begin = ATTENTIONS[name], [], Reading._begin
    monkeypatch.setattr(Reading, "_begin", lambda *call: begun.append(call) or begin(*call))
    told = [[] for _ in range(4)]
    engine = make_engine(attention, (ROOM,))
    handles = [engine.submit(one, mine.append) for one, mine in zip(samples(4), told, strict=True)]
    run(engine)
    assert all(handle.done for handle in handles)
    alone, read = Alone(attention, (), 8), len(PROMPT)
    pieces = [[event for event in mine if isinstance(event, Piece)] for mine in told]
    tokens = [tuple(piece.token_id for piece in each) for each in pieces]
    assert tokens == [alone(one)[0] for one in samples(4)]
    assert len(set(tokens)) > 1
    # The fourth comes when a slot is free again. Rows in host memory are not copied.
    copied = name != "staged"
    usages = [each[-1].usage for each in pieces]
    assert [usage.cached_tokens for usage in usages] == [0, read * copied, read * copied, 0]
    assert len(begun) == (2 if copied else 4)
    assert engine.stats().prompt_tokens == 4 * read
    for events in told:
        progress = [event.read_tokens for event in events if isinstance(event, Progress)]
        assert progress[-1] == read
    for usage in usages:
        assert 0 <= usage.waited_seconds <= usage.first_token_seconds <= usage.total_seconds


def test_those_before_in_line_lose_no_slot():
    """Of three slots one is taken and one is another's who came first: nobody sits beside."""
    engine = make_engine(None, (ROOM,), short_tokens=512)
    requests = [*samples(1), *samples(1, OTHER), *samples(2)]
    handles = [engine.submit(one) for one in requests]
    run(engine)
    cached = [one.result(0).usage.cached_tokens for one in handles]
    # The third takes the last slot but one, as the second is sure of the other.
    assert cached == [0, 0, 400, 0]
    alone = Alone(None, (), 8)
    assert [one.result(0).token_ids for one in handles] == [alone(one)[0] for one in requests]


def test_only_the_same_prompt_is_copied():
    engine = make_engine(None, (ROOM,))
    shorter, changed = PROMPT[:-1], [*PROMPT[:-1], (PROMPT[-1] + 1) % 50]
    handles = [engine.submit(samples(1, prompt)[0]) for prompt in (PROMPT, shorter, changed)]
    run(engine)
    assert [one.result(0).usage.cached_tokens for one in handles] == [0, 0, 0]


def test_one_that_was_cancelled_takes_no_slot():
    """While the prompt was read: nobody has swept it out of the line yet."""
    engine = make_engine(None, (ROOM,))
    handles = []

    def cancel(event):
        if isinstance(event, Progress):
            handles[1].cancel()

    one, other, third = samples(3)
    handles = [engine.submit(one, cancel), engine.submit(other), engine.submit(third)]
    run(engine)
    assert handles[0].done
    ended = [handles[i].result(0) for i in (1, 2)]
    assert [each.finish_reason for each in ended] == ["interrupted", "length"]
    assert [each.usage.cached_tokens for each in ended] == [0, 400]


def test_a_copy_that_fails_ends_its_own_answers_alone(monkeypatch):
    def fail(*_):
        raise MemoryError("none left")

    monkeypatch.setattr("wavejax.engine.batching.sharing.copy_slot", fail)
    engine = make_engine(None, (ROOM,))
    handles = [engine.submit(one) for one in samples(3)]
    run(engine)
    assert handles[0].result(0).token_ids == Alone(None, (), 8)(samples(1)[0])[0]
    for handle in handles[1:]:
        with pytest.raises(MemoryError, match="none left"):
            handle.result(0)
    assert engine.stats().finished == {"length": 1, "error": 2}


@pytest.mark.parametrize("name", ["dense", "device"])
def test_a_copy_is_the_whole_slot_and_nothing_else(name):
    """Every array's part of the target is the source's; all other parts stay."""
    generator, params = Generator(MODEL, ATTENTIONS[name]), make_params()
    state = generator.start(params, list(make_prompts((300, 60, 17), seed=1)), 4)
    before = jax.tree.map(np.array, (state.attention_state, state.logits))
    names = jax.tree.leaves(logical_axes(state.attention_state))
    state = copy_slot(state, 0, 2)
    after = jax.tree.map(np.array, (state.attention_state, state.logits))
    differ = 0
    for axes, old, new in zip(
        [*names, ("sequences", "vocab")], *map(jax.tree.leaves, (before, after)), strict=True
    ):
        if "sequences" not in axes:
            np.testing.assert_array_equal(old, new)
            continue
        old, new = (np.moveaxis(x, axes.index("sequences"), 0) for x in (old, new))
        np.testing.assert_array_equal(new[:2], old[:2])
        np.testing.assert_array_equal(new[2], old[0])
        differ += not np.array_equal(old[2], old[0])
    assert differ > len(names) // 2


def test_warming_up_compiles_the_copy():
    engine = make_engine(None, (ROOM,))
    sharing._copy.clear_cache()  # of what other tests compiled
    engine.warmup(prompt_tokens=[len(PROMPT)])
    compiled = sharing._copy._cache_size()
    handles = [engine.submit(one) for one in samples(2)]
    run(engine)
    assert handles[1].result(0).usage.cached_tokens == len(PROMPT)
    assert sharing._copy._cache_size() == compiled > 0


@pytest.mark.parametrize("name", ["dense", "device"])
def test_a_copy_takes_no_more_than_a_layers_part_of_a_slot(name):
    """In place: a slot may hold many gigabytes. Of 8 layers and 4 slots a copy would be 1/4."""
    shape = CacheShape(layers=8, kv_heads=2, head_dim=64)
    empty = jax.eval_shape(
        lambda: ATTENTIONS[name].init_state(shape, 4, 8192, 64, jnp.dtype("float32"))
    )
    held = empty, jax.ShapeDtypeStruct((4, 50), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    memory = sharing._copy.lower(held, number, number).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 30
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
