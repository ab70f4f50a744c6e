"""Pages in the host's memory reach the device as they are, whether blocks are pinned or not."""

import gc
import threading
import time
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.scripts import load_script

PAGE = 16


@pytest.mark.parametrize("pinned", ["at once", "by numpy", ""])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_pages_stay_as_they_were_sent(monkeypatch, pinned, dtype):
    host_pages = load_script("host_pages")
    if pinned == "by numpy":
        monkeypatch.setattr(host_pages, "ADDRESSES", (lambda _: 1 / 0, host_pages.ADDRESSES[1]))
    if not pinned:
        monkeypatch.setattr(host_pages.Block, "_sees_changes", lambda self: False)
    shape, chosen = (3, 2, 3, 11, 64), 5
    pages = host_pages.HostPages(shape, dtype, chosen, threads=3)
    assert pages.pinned == bool(pinned)
    assert (pages.not_pinned is None) == bool(pinned)
    rng = np.random.default_rng(len(pinned))
    size = (3, 2, 3, 11, PAGE, 64)
    written = [jnp.asarray(rng.normal(size=size), dtype) for _ in range(2)]
    for layer in range(3):
        for sequence in range(2):
            pages.put(layer, sequence, *(x[layer, sequence] for x in written))
    sent = []
    for turn in range(7):
        ids = np.stack(
            [np.sort(rng.permutation(11)[:chosen]) for _ in range(6)], dtype=np.int32
        ).reshape(2, 3, chosen)
        sent.append((turn % 3, ids, *pages.send(turn % 3, ids)[:2]))
    for layer, ids, *found in sent:
        for part, x in zip(written, found, strict=True):
            expected = np.take_along_axis(
                np.asarray(part[layer]), ids[..., None, None].astype(int), axis=2
            )
            np.testing.assert_array_equal(np.asarray(x), expected.reshape(2, 3, -1, 64))
    assert pages.choose_threads().keys() >= {1}
    assert pages.send_rate() > 0
    pages.close()


def test_helpers_keep_no_pages():
    """Or what a failure leaves behind would take the next configuration's memory."""
    pages = load_script("host_pages").HostPages((1, 1, 2, 9, 64), "float32", 4, threads=3)
    pages.send(0, np.zeros((1, 2, 4), np.int32))
    rows = weakref.ref(pages.rows)
    del pages
    for _ in range(100):
        gc.collect()
        if rows() is None:
            break
        time.sleep(0.05)
    assert rows() is None


def test_what_fails_in_a_helper_is_raised(monkeypatch):
    pages = load_script("host_pages").HostPages((1, 1, 2, 9, 64), "float32", 4, threads=3)
    caller, take = threading.get_ident(), np.take

    def fail(*operands):
        if threading.get_ident() != caller:
            raise ValueError("not here")
        return take(*operands)

    monkeypatch.setattr(np, "take", fail)
    with pytest.raises(ValueError, match="not here"):
        pages.send(0, np.zeros((1, 2, 4), np.int32))
    pages.close()


def test_why_a_block_is_not_pinned_is_told(monkeypatch):
    host_pages = load_script("host_pages")
    monkeypatch.setattr(host_pages, "ADDRESSES", (lambda _: 1 / 0,))
    pages = host_pages.HostPages((1, 1, 2, 9, 64), "float32", 4, threads=1)
    assert not pages.pinned
    assert pages.not_pinned == "ZeroDivisionError: division by zero"
    pages.close()
