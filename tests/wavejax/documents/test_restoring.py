"""What restoring a document holds at once, and rows that come in pieces."""

import dataclasses
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.documents import transfers
from wavejax.documents.stored_arrays import StoredArray
from wavejax.documents.transfers import AHEAD, Transfers, piece_of

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


@pytest.mark.parametrize("tokens, most", [(1, 1), (7, 7), (64, 64), (100, 64), (1000, 64)])
def test_pieces_are_of_one_length_and_leave_no_row_out(tokens, most, monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", 64 * 32)
    file = StoredArray(Path("rows.npy"), (3, tokens, 2, 8), "bfloat16", 3 * tokens * 32, 0)
    for wanted in {tokens, (tokens + 1) // 2}:
        rows, starts = piece_of(file, wanted)
        assert rows <= min(most, wanted) < 2 * rows or rows == most
        covered = {start + i for start in starts for i in range(rows)}
        assert covered == {*range(wanted)}
    assert piece_of(file, 0) == (0, [])


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(CONFIG, "device"), INT8])
def test_rows_that_come_in_pieces_are_those_that_were_kept(attention, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", 2**12)
    generator, [prompt] = Generator(MODEL, attention, GREEDY), make_prompts((300,))
    given = {"generator": generator, "params": make_params()}
    state = generator.start(make_params(), [prompt], 12)
    wavejax.save_document(state, tmp_path / "d", token_ids=prompt, **given)
    document = wavejax.load_document(tmp_path / "d", **given)
    name = "keys/0" if isinstance(attention, DenseAttention) else "store/rows/data/0"
    assert len(piece_of(document.folder.arrays[name], 200)[1]) > 1
    _, expected = generator.decode_n(make_params(), state, 12)
    _, tokens = generator.decode_n(make_params(), document.start(generator, 12), 12)
    np.testing.assert_array_equal(tokens, expected)
