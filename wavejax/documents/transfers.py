"""A document's files on their way to the device: checked and brought side by side.

One thread reads a file's pages, checks them and copies them into pinned memory at some 1 to 3 GB/s.
A bus takes 50. So several threads check files, one each, and what goes to the device is cut into
pieces, several of which are under way at a time.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from wavejax.documents.stored_arrays import StoredArray
from wavejax.engine.prompts import rounded_up

THREADS = min(16, os.cpu_count() or 1)
AHEAD = 2  # Groups that are brought at a time: what is on the device besides the state.
PIECE_BYTES = 2**25  # Of a piece, about: what a thread pins at a time.

Maker = Callable[[], np.ndarray]


class Checks:
    """Checks files in several threads, in the order in which they are given.

    Args:
        files: what to check.
    """

    def __init__(self, files: Sequence[StoredArray]):
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS, "checks of a document")
        self._checks = {file: self._pool.submit(file.check) for file in dict.fromkeys(files)}
        self._pool.shutdown(wait=False)

    def wait(self, *files: StoredArray) -> None:
        """Wait until files are checked; raises InputError where one is damaged."""
        for file in files:
            self._checks[file].result()

    def cancel(self) -> None:
        """Check no more of them."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Transfers:
    """Brings groups of arrays to a device, `AHEAD` of them before they are asked for.

    Args:
        device: where to; None for JAX's default.
        groups: of each, what makes its arrays on the host; called in a thread.
    """

    def __init__(self, device: jax.Device | None, groups: Sequence[Sequence[Maker]]):
        self._device, self._left = device, collections.deque(groups)
        self._coming: collections.deque[list[concurrent.futures.Future[Array]]]
        self._coming = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS, "rows of a document")
        for _ in range(AHEAD):
            self._send()

    def take(self) -> list[Array]:
        """Return the next group's arrays, once all are on the device."""
        arrays = [one.result() for one in self._coming.popleft()]
        self._send()
        return arrays

    def cancel(self) -> None:
        """Bring no more, and let go of what has come."""
        self._left.clear()
        self._coming.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self) -> None:
        if self._left:
            group = self._left.popleft()
            self._coming.append([self._pool.submit(self._bring, make) for make in group])
        if not self._left:
            self._pool.shutdown(wait=False)

    def _bring(self, make: Maker) -> Array:
        # What is pinned for it is free again before the thread takes the next one.
        return jax.block_until_ready(jax.device_put(make(), self._device))


def row_pieces(file: StoredArray, tokens: int) -> tuple[int, list[int]]:
    """Cut one head's rows into pieces of one length, so that all take one program.

    Args:
        file: of a layer's rows, `[kv_heads, tokens, ...]`.
        tokens: how many rows are wanted of each head.

    Returns:
        the rows of a piece: 1, 1.25, 1.5 or 1.75 times a power of two, for few programs; and where
        each begins. The last one begins early enough to be whole.
    """
    if not tokens:
        return 0, []
    heads, held = file.shape[:2]
    row_bytes = max(1, file.bytes // (heads * held))
    # Two at least: one would be much longer than the rows, or leave some out.
    least = -(-tokens // max(2, -(-tokens * row_bytes // PIECE_BYTES)))
    rows = min(tokens, rounded_up(least, 4))
    return rows, _starts(tokens, rows)


def layer_pieces(layers: int, layer_bytes: int) -> tuple[int, list[int]]:
    """Cut an array of all layers into pieces of as many layers each: a power of two.

    Args:
        layers: how many there are.
        layer_bytes: of one.

    Returns:
        the layers of a piece, and where each begins, as of `row_pieces`.
    """
    most = max(1, min(layers, PIECE_BYTES // max(1, layer_bytes)))
    count = 1 << (most.bit_length() - 1)
    return count, _starts(layers, count)


def _starts(whole: int, piece: int) -> list[int]:
    return [min(start, whole - piece) for start in range(0, whole, piece)]
