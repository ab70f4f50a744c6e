"""What restoring a document holds at once, and rows that come in pieces."""

import dataclasses
import gc
import threading
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.documents import transfers
from wavejax.documents.stored_arrays import StoredArray
from wavejax.documents.transfers import AHEAD, Transfers, layer_pieces, row_pieces

INT8 = WaveAttention(dataclasses.replace(CONFIG, row_dtype="int8"), "device")


def test_few_groups_are_brought_before_they_are_asked_for():
    made, some = [], threading.Condition()

    def maker(group):
        def make():
            with some:
                made.append(group)
                some.notify_all()
            return np.full(3, group)

        return make

    groups = [[maker(i), maker(i)] for i in range(6)]
    coming = Transfers(jax.devices()[0], groups)
    for taken in range(6):
        expected = 2 * min(6, taken + AHEAD)
        with some:
            assert some.wait_for(lambda count=expected: len(made) >= count, 30)
        assert max(made) < taken + AHEAD
        np.testing.assert_array_equal(coming.take(), np.full((2, 3), taken))


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 100, 129, 1000, 66_000])
def test_pieces_are_of_one_length_and_leave_no_row_out(tokens, monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", 64 * 32)
    file = StoredArray(Path("rows.npy"), (3, tokens, 2, 8), "bfloat16", 3 * tokens * 32, 0)
    for wanted in {tokens, (tokens + 1) // 2}:
        rows, starts = row_pieces(file, wanted)
        covered = {start + i for start in starts for i in range(rows)}
        assert covered == {*range(wanted)}
        assert rows <= 64 * 1.25
        assert len(starts) * rows <= 1.25 * wanted + 4  # few rows come twice
    assert row_pieces(file, 0) == (0, [])


def test_layers_are_cut_into_pieces_of_a_power_of_two(monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", 100)
    assert layer_pieces(30, 10) == (8, [0, 8, 16, 22])
    assert layer_pieces(3, 1000) == (1, [0, 1, 2])
    assert layer_pieces(3, 0) == (2, [0, 1])


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(CONFIG, "device"), INT8])
def test_rows_that_come_in_pieces_are_those_that_were_kept(attention, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", 2**12)
    generator, [prompt] = Generator(MODEL, attention, GREEDY), make_prompts((300,))
    given = {"generator": generator, "params": make_params()}
    state = generator.start(make_params(), [prompt], 12)
    wavejax.save_document(state, tmp_path / "d", token_ids=prompt, **given)
    document = wavejax.load_document(tmp_path / "d", **given)
    name = "keys/0" if isinstance(attention, DenseAttention) else "store/rows/data/0"
    assert len(row_pieces(document.folder.arrays[name], 200)[1]) > 1
    _, expected = generator.decode_n(make_params(), state, 12)
    _, tokens = generator.decode_n(make_params(), document.start(generator, 12), 12)
    np.testing.assert_array_equal(tokens, expected)


def kept(tmp_path, attention=None):
    """A kept document, what loads it, and an empty state for it."""
    generator = Generator(MODEL, attention or WaveAttention(CONFIG, "device"), GREEDY)
    [prompt] = make_prompts((300,))
    given = {"generator": generator, "params": make_params()}
    state = generator.start(make_params(), [prompt], 12)
    wavejax.save_document(state, tmp_path / "d", token_ids=prompt, **given)
    document = wavejax.load_document(tmp_path / "d", **given)
    return generator, document, generator.allocate(1, 300, 12), np.asarray(prompt)


def test_one_that_is_given_up_lets_go_of_what_was_on_its_way(tmp_path):
    generator, document, state, prompt = kept(tmp_path)
    work = document.restoring(generator.engine, state.attention_state, 0, prompt)
    held = work.step(work.step(state.attention_state))
    threads = [one for one in threading.enumerate() if "of a document" in one.name]
    gone = weakref.ref(work)
    gc.disable()  # a cycle would keep it
    try:
        work.close()
        del work
        assert gone() is None
    finally:
        gc.enable()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    del held


@pytest.mark.parametrize("damaged", ["index/token_ids", "index/offsets", "steady/window"])
def test_a_damaged_index_is_found_before_anything_is_donated(damaged, tmp_path):
    generator, document, state, _ = kept(tmp_path)
    file = document.folder.arrays[damaged].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(wavejax.InputError, match="is not what was written"):
        document.insert(generator, state, 0)
    # The state can still be used.
    [prompt] = make_prompts((300,))
    generator.insert(make_params(), state, 0, prompt)
