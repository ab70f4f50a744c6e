"""A document's files on their way to the device: checked and brought side by side.

One thread reads a file's pages, checks them and copies them into pinned memory at some 1 to 3 GB/s,
a bus takes 50. So each file is checked by a thread of its own, and a layer's rows are brought in
pieces, several at a time.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from wavejax.documents.stored_arrays import StoredArray

THREADS = min(16, os.cpu_count() or 1)
AHEAD = 2  # Groups that are brought at a time: what is on the device besides the state.
PIECE_BYTES = 2**25  # Of one head's rows, at most: what a thread pins at a time.

Check = concurrent.futures.Future[None]


class Checks:
    """Checks files in threads of their own, in the order in which they are given.

    Args:
        files: what to check.
    """

    def __init__(self, files: Sequence[StoredArray]):
        pool = concurrent.futures.ThreadPoolExecutor(THREADS, "checks of a document")
        self._checks: dict[StoredArray, Check] = {
            file: pool.submit(file.check) for file in dict.fromkeys(files)
        }
        pool.shutdown(wait=False)

    def wait(self, *files: StoredArray) -> None:
        """Wait until files are checked; raises InputError where one is damaged."""
        for file in files:
            self._checks[file].result()


class Transfers:
    """Brings groups of arrays to the device, `AHEAD` of them before they are asked for.

    Args:
        device: where to.
        groups: of each, what makes its arrays on the host; called in a thread.
    """

    def __init__(self, device: Any, groups: Sequence[Sequence[Callable[[], np.ndarray]]]):
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

    def _send(self) -> None:
        if self._left:
            group = self._left.popleft()
            self._coming.append([self._pool.submit(self._bring, make) for make in group])
        if not self._left:
            self._pool.shutdown(wait=False)

    def _bring(self, make: Callable[[], np.ndarray]) -> Array:
        # What is pinned for it is free again before the thread takes the next one.
        return jax.block_until_ready(jax.device_put(make(), self._device))


def piece_of(file: StoredArray, tokens: int) -> tuple[int, list[int]]:
    """Cut one head's rows into pieces of one length, so that all take one program.

    Args:
        file: of a layer's rows, `[kv_heads, tokens, ...]`.
        tokens: how many rows are wanted of each head.

    Returns:
        the rows of a piece, a power of two; and where each begins. The last one begins early enough
        to be whole.
    """
    if not tokens:
        return 0, []
    heads, held = file.shape[:2]
    row_bytes = max(1, file.bytes // (heads * held))
    most = min(tokens, max(1, PIECE_BYTES // row_bytes))
    rows = 1 << (most.bit_length() - 1)
    return rows, [min(start, tokens - rows) for start in range(0, tokens, rows)]
