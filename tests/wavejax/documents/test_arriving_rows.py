"""Rows that are still on their way: read from the file until their layer is there and checked."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import NO_ID
from wavejax import InputError
from wavejax.documents.arriving_rows import ArrivingRows
from wavejax.documents.files import read_folder, write_folder
from wavejax.documents.stored_arrays import StoredArray
from wavejax.store.host_rows import HostRows

LAYERS, BATCH, HEADS, ROOM, KEPT, DIM = 3, 2, 2, 60, 45, 4


@pytest.fixture
def kept(tmp_path):
    """The rows of a document, and their files."""
    rows = np.random.default_rng(0).normal(size=(LAYERS, HEADS, KEPT, 2, DIM)).astype(np.float32)
    made = [(f"rows/{layer}", lambda layer=layer: rows[layer]) for layer in range(LAYERS)]
    write_folder(tmp_path, {}, made)
    return rows, list(read_folder(tmp_path).arrays.values())


@pytest.fixture
def gate(monkeypatch):
    """Holds the arrival of each layer until it is let through."""
    gate, check = threading.Semaphore(0), StoredArray.check

    def wait(self):
        assert gate.acquire(timeout=60)
        check(self)

    monkeypatch.setattr(StoredArray, "check", wait)
    return gate


def make_rows(files, slot=1):
    rows = ArrivingRows(HostRows((LAYERS, BATCH, HEADS, ROOM, 2, DIM), ROOM, np.float32))
    rows.receive(slot, files)
    return rows


def listed(rng, slot):
    """Store rows of each head, some of them past the document's: those that were grown."""
    tokens = np.full((BATCH, HEADS, ROOM), NO_ID, np.int32)
    for head in range(HEADS):
        tokens[slot, head, :30] = rng.permutation(KEPT + 5)[:30]
        tokens[1 - slot, head, :5] = rng.permutation(5)
    return tokens


def test_rows_are_read_before_they_have_arrived(kept, gate):
    expected, files = kept
    rows, rng = make_rows(files), np.random.default_rng(1)
    # What a growth puts behind the document's rows, and another slot's rows, lie here already.
    grown = rng.normal(size=(LAYERS, HEADS, 5, 2, DIM)).astype(np.float32)
    other = rng.normal(size=(LAYERS, HEADS, 5, 2, DIM)).astype(np.float32)
    rows.put((slice(None), 1, slice(None), slice(KEPT, KEPT + 5)), jnp.asarray(grown))
    rows.put((slice(None), 0, slice(None), slice(0, 5)), jnp.asarray(other))
    whole = np.concatenate([expected, grown], axis=2)
    for arrived in range(LAYERS + 1):
        for layer in range(LAYERS):
            tokens = listed(rng, 1)
            block = rows.gather(layer, tokens)
            for slot, source in ((0, other), (1, whole)):
                for head in range(HEADS):
                    some = tokens[slot, head][tokens[slot, head] != NO_ID]
                    np.testing.assert_array_equal(
                        block[slot, head, : len(some)], source[layer, head, some]
                    )
        there = [np.any(rows.rows[layer, 1, :, :KEPT]) for layer in range(LAYERS)]
        assert there == [layer < arrived for layer in range(LAYERS)]
        if arrived < LAYERS:
            gate.release()
            rows._arrivals[0].wait(arrived)
    rows.settle()
    assert not rows._arrivals
    np.testing.assert_array_equal(rows.rows[:, 1, :, :KEPT], expected)


def test_damage_is_found_when_the_layer_arrives(kept, gate):
    _, files = kept
    data = bytearray(files[1].file.read_bytes())
    data[-3] ^= 1
    files[1].file.write_bytes(data)
    rows, tokens = make_rows(files), listed(np.random.default_rng(1), 1)
    rows.gather(1, tokens)  # nothing is known of it yet
    for _ in range(LAYERS):
        gate.release()
    with pytest.raises(InputError, match=r"rows\.1\.npy is not what was written"):
        rows.settle()
    with pytest.raises(InputError, match=r"rows\.1\.npy is not what was written"):
        rows.gather(0, tokens)


def test_a_prompt_read_into_the_slot_waits_for_what_arrives_there(kept, gate):
    expected, files = kept
    rows = make_rows(files)
    for _ in range(LAYERS):
        gate.release()
    new = jnp.ones((HEADS, 10, 2, DIM))
    rows.put((0, 1, slice(None), slice(0, 10)), new)
    rows.take_in()
    np.testing.assert_array_equal(rows.rows[0, 1, :, :10], new)
    np.testing.assert_array_equal(rows.rows[1, 1, :, :KEPT], expected[1])
