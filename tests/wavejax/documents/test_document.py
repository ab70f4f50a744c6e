"""A kept document gives the tokens that the state it was made of gives."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, SAMPLED, make_params, make_prompts
from tests.wavejax.engine.test_compiled_programs import CompileLog
from wavejax import DenseAttention, Generator, InputError, Sampler, WaveAttention
from wavejax.documents import arrays
from wavejax.documents.stored_arrays import StoredArray
from wavejax.engine.generator import NO_TOKEN
from wavejax.store.shape import CacheShape

ATTENTIONS = {
    "dense": DenseAttention(),
    "dense in int8": DenseAttention(row_dtype="int8"),
    "device": WaveAttention(CONFIG, "device"),
    "host": WaveAttention(CONFIG, "host", "in_place"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
    "moments": WaveAttention(dataclasses.replace(CONFIG, moment_rank=2, audit=0.1), "device"),
}
PENALISED = Sampler(1.0, top_k=7, repetition_penalty=1.3, presence_penalty=0.2)
PROMPT, SHORT = make_prompts((318, 30))
NEW_TOKENS = 90  # the index grows once


def decode(generator, state, steps):
    state, tokens = generator.decode_n(make_params(), state, steps)
    return state, np.asarray(tokens)[:, 0]


def keep(tmp_path, generator, state, token_ids, **more):
    wavejax.save_document(
        state,
        tmp_path / "kept",
        generator=generator,
        params=make_params(),
        token_ids=token_ids,
        **more,
    )


def load(tmp_path, generator):
    return wavejax.load_document(tmp_path / "kept", generator=generator, params=make_params())


@pytest.mark.parametrize(
    "name",
    [
        name if "dense" in name else pytest.param(name, marks=pytest.mark.slow(20))
        for name in ATTENTIONS
    ],
)
def test_a_kept_document_gives_the_same_tokens(name, tmp_path):
    generator = Generator(MODEL, ATTENTIONS[name], GREEDY)
    samplers = [GREEDY, SAMPLED]
    state = generator.start(make_params(), [PROMPT, PROMPT], NEW_TOKENS, seed=3, samplers=samplers)
    keep(tmp_path, generator, state, PROMPT)
    _, expected = generator.decode_n(make_params(), state, 80)
    document = load(tmp_path, generator)
    assert document.token_ids.tolist() == list(PROMPT)
    given = {"params": make_params(), "prompts": [PROMPT, PROMPT], "samplers": samplers}
    assert document.reused(PROMPT) == len(PROMPT)
    made = document.start(generator, NEW_TOKENS, seed=3, **given)
    # It is the state that reading makes: in the same memory, for the same compiled program.
    with CompileLog() as log:
        _, tokens = generator.decode_n(make_params(), made, 80)
    np.testing.assert_array_equal(tokens, expected)
    assert not log.names


@pytest.mark.slow(35)
def test_every_store_reads_what_any_store_kept(tmp_path):
    """The same arrays, whichever engine wrote them: rows go where the reader's settings say."""
    generators = {
        name: Generator(MODEL, attention, GREEDY)
        for name, attention in ATTENTIONS.items()
        if "dense" not in name and name != "moments"
    }
    state = generators["device"].start(make_params(), [PROMPT], NEW_TOKENS)
    keep(tmp_path, generators["device"], state, PROMPT)
    _, expected = decode(generators["device"], state, 12)
    for generator in generators.values():
        restored = load(tmp_path, generator).start(generator, NEW_TOKENS)
        np.testing.assert_array_equal(decode(generator, restored, 12)[1], expected)


@pytest.mark.slow(30)
def test_staged_tokens_come_before_the_rows_have_arrived(tmp_path, monkeypatch):
    """No layer's rows arrive before the tokens are there; the question is forced through steps."""
    generator = Generator(MODEL, ATTENTIONS["staged"], GREEDY)
    state = generator.start(make_params(), [PROMPT], NEW_TOKENS)
    keep(tmp_path, generator, state, PROMPT)
    question = np.asarray(SHORT[:5])[:, None]
    state, _ = generator.force(make_params(), state, question)
    _, expected = decode(generator, state, 8)
    gate, check = threading.Event(), StoredArray.check

    def wait(stored):
        if stored.file.name.startswith("store."):
            assert gate.wait(timeout=300)
        check(stored)

    monkeypatch.setattr(StoredArray, "check", wait)
    state = load(tmp_path, generator).start(generator, NEW_TOKENS)
    state, _ = generator.force(make_params(), state, question)
    state, tokens = decode(generator, state, 8)
    rows = state.attention_state.rows
    assert not np.any(rows.rows)
    np.testing.assert_array_equal(tokens, expected)
    gate.set()
    rows.settle()
    assert np.all(np.any(rows.rows[:, 0, :, :298], axis=(2, 3, 4)))


@pytest.mark.slow(45)
def test_a_sequence_that_has_grown_goes_on(tmp_path):
    """Its tokens so far are the prompt's and those drawn; noise and counts go on too."""
    generator = Generator(MODEL, ATTENTIONS["host"], PENALISED)
    state = generator.start(make_params(), [PROMPT], 3 * NEW_TOKENS, seed=5)
    state, first = decode(generator, state, 80)
    assert int(state.attention_state.index.tokens[0]) > CONFIG.indexed_tokens(len(PROMPT))
    so_far = [*PROMPT, *first.tolist()]
    keep(tmp_path, generator, state, so_far)
    document = load(tmp_path, generator)
    plain = dataclasses.replace(generator, sampler=GREEDY)
    with pytest.raises(InputError, match="the state has no room for the document"):
        document.insert(plain, plain.allocate(1, len(so_far), 0), 0)
    restored = document.start(plain, 70)
    forced = plain.start(make_params(), [PROMPT], 3 * NEW_TOKENS)
    forced, _ = plain.force(make_params(), forced, first[:, None])
    (_, tokens), (_, expected) = decode(plain, restored, 70), decode(plain, forced, 70)
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens != NO_TOKEN).all()


@pytest.mark.slow(30)
def test_a_slot_that_was_used_takes_a_document(tmp_path):
    """Nothing of what the slot held is left: not its rows, nor its clusters, nor its cache."""
    generator = Generator(MODEL, ATTENTIONS["host"], GREEDY)
    state = generator.start(make_params(), [SHORT], NEW_TOKENS)
    keep(tmp_path, generator, state, SHORT)
    _, expected = decode(generator, state, 20)
    state = generator.start(make_params(), [PROMPT, PROMPT], NEW_TOKENS)
    state, _ = generator.decode_n(make_params(), state, 20)
    before, _ = generator.decode_n(make_params(), jax.tree.map(lambda x: x.copy(), state), 20)
    state = load(tmp_path, generator).insert(generator, generator.release(state, 0), 0)
    state, tokens = generator.decode_n(make_params(), state, 20)
    np.testing.assert_array_equal(np.asarray(tokens)[:, 0], expected)
    np.testing.assert_allclose(state.logits[1], before.logits[1], atol=1e-5)


@pytest.mark.slow(25)
def test_half_precision_is_kept_as_it_is(tmp_path):
    params = jax.tree.map(lambda x: x.astype("bfloat16"), make_params())
    generator = Generator(MODEL, ATTENTIONS["device"], GREEDY)
    state = generator.start(params, [PROMPT], 10)
    given = {"generator": generator, "params": params}
    wavejax.save_document(state, tmp_path / "kept", token_ids=PROMPT, **given)
    document = wavejax.load_document(tmp_path / "kept", **given)
    restored = document.start(generator, 10)
    assert restored.attention_state.store.rows.dtype == "bfloat16"
    _, expected = generator.decode_n(params, state, 8)
    np.testing.assert_array_equal(generator.decode_n(params, restored, 8)[1], expected)


def test_all_of_an_index_is_kept_and_no_count_of_steps():
    """Moments and bounds too; not the row cache, nor what an audit found."""
    config = dataclasses.replace(CONFIG, moment_rank=2, moment_dtype="int8", bounds=True, audit=0.1)
    config = dataclasses.replace(config, reach=1.0)
    shape = CacheShape.of(MODEL)
    state = WaveAttention(config, "device", cached=True).init_state(shape, 2, 300, 10, "float32")
    kept = {part.name for part in arrays.parts_of(state)}
    paths = jax.tree_util.tree_leaves_with_path(state)
    names = {"/".join(key.name for key in path) for path, _ in paths}
    left_out = {name for name in names - kept if not name.startswith("cache/")}
    audit = {"audit/errors", "audit/count", "audit/sequences"}
    assert left_out == audit | {"step", "attended", "index/growths"}
    assert {"index/moments/weight_scales", "index/deviations"} <= kept
    config = dataclasses.replace(CONFIG, pooled_covariance=True)
    state = WaveAttention(config, "device").init_state(shape, 2, 300, 10, "float32")
    assert "index/covariance" in {part.name for part in arrays.parts_of(state)}
    assert {"store/rows/data", "steady/window"} <= kept
    assert not any(name.startswith("cache/") for name in kept)


def test_what_is_not_the_sequences_is_refused(tmp_path):
    generator = Generator(MODEL, ATTENTIONS["dense"], GREEDY)
    state = generator.start(make_params(), [SHORT], 10)
    with pytest.raises(InputError, match="token_ids has 29 tokens and the sequence 30"):
        keep(tmp_path, generator, state, SHORT[1:])
    with pytest.raises(InputError, match="slot is 1"):
        keep(tmp_path, generator, state, SHORT, slot=1)
    keep(tmp_path, generator, state, SHORT, facts={"title": "été"})
    document = load(tmp_path, generator)
    assert document.facts == {"title": "été"}
    small = generator.allocate(1, 10, 10)
    assert document.insert(generator, small, 0).prompt_room == 128  # a bucket's least
    # Nothing of a state that is too small is used up.
    keep(tmp_path, generator, generator.start(make_params(), [PROMPT], 0), PROMPT)
    tiny, long = generator.allocate(1, 200, 0), load(tmp_path, generator)
    with pytest.raises(InputError, match="has 318 tokens, and there is room for 224"):
        long.insert(generator, tiny, 0)
    prompt = {"prompt": [*PROMPT[:220], 3], "params": make_params()}
    with pytest.raises(InputError, match="for the document and the 60 tokens after it: make it"):
        long.insert(generator, tiny, 0, **prompt | {"prompt": [*PROMPT[:220], *PROMPT[:60]]})
    assert not long.insert(generator, tiny, 0, **prompt).finished[0]
    keep(tmp_path, generator, state, SHORT)
    document = load(tmp_path, generator)
    other = generator.allocate(1, 10, 10, samplers=[SAMPLED])
    with pytest.raises(InputError, match="the sampler needs what the state was not made for"):
        document.insert(generator, other, 0, sampler=PENALISED)
