"""Pages of keys and values in the host's memory, gathered there by threads and sent to the device.

A page is 16 tokens' keys, or values, of one kv head: one piece of memory. The chosen pages of all
sequences and kv heads are copied side by side into a pinned block, and one copy sends the block.
The keys' block is on its way while the values' is filled.
"""

import ctypes
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

PAGE_TOKENS = 16
PARTS = 2  # keys, values
WORD = np.dtype(np.uint64)  # pages are copied as such: numpy copies of bfloat16 are slow
TRIALS = 3
# Ways to ask where a pinned array is. The second one is a copy where numpy cannot read it in place.
ADDRESSES: tuple[Callable[[Array], int], ...] = (
    lambda array: array.unsafe_buffer_pointer(),
    lambda array: np.asarray(array).ctypes.data,
)


class Block:
    """A piece of host memory that numpy fills and JAX sends.

    Attributes:
        pinned: whether XLA pinned it. If not, XLA copies it once more before it is sent.
        failure: why it is not pinned; "" if it is.
        words: `[pages, words]` uint64, what numpy fills.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, page_words: int):
        """Make room for an array of this shape, which begins with the pages' axes."""
        device = jax.devices()[0]
        self._there = SingleDeviceSharding(device)
        self._sent: Array | None = None
        self._array: Array | None = None
        self.pinned, self.failure = False, ""
        for address in ADDRESSES:
            try:
                here = SingleDeviceSharding(device, memory_kind="pinned_host")
                array = jax.block_until_ready(jax.device_put(jnp.zeros(shape, dtype), here))
                memory = (ctypes.c_uint8 * array.nbytes).from_address(address(array))
                self.words = np.frombuffer(memory, WORD).reshape(-1, page_words)
                self._array = array
                self.pinned = self._sees_changes()
                self.failure = "" if self.pinned else "the device does not see what numpy writes"
            except Exception as error:  # The block is then in memory that is not pinned.
                self.failure = f"{type(error).__name__}: {error}"[:300]
            if self.pinned:
                break
        else:
            self._array = None
            self._own = np.zeros(shape, dtype)
            self.words = self._own.reshape(-1).view(WORD).reshape(-1, page_words)

    def _sees_changes(self) -> bool:
        """Whether what numpy writes is what the device gets."""
        for number in (1, 2):
            self.words[:] = number
            found = np.ascontiguousarray(np.asarray(self.send())).reshape(-1).view(WORD)
            if not (found == number).all():
                return False
        return True

    def wait(self) -> None:
        """Wait until what was sent last has left: the block may be filled again."""
        if self._sent is not None:
            self._sent.block_until_ready()
            self._sent = None

    def send(self) -> Array:
        """Begin to copy the block to the device."""
        held: Any = self._array
        if held is None:
            # A CPU's device would read the block where it is.
            held = self._own.copy() if jax.default_backend() == "cpu" else self._own
        self._sent = jax.device_put(held, self._there)
        return self._sent


Job = Callable[[int], None]  # given the part


def _help(jobs: SimpleQueue[Job | None], done: list[SimpleQueue[Exception | None]]) -> None:
    """Do jobs, of each the parts one after another, until there are no more."""
    while (job := jobs.get()) is not None:
        for part, told in enumerate(done):
            try:
                job(part)
            except Exception as error:  # raised where it is waited for
                told.put(error)
            else:
                told.put(None)
        del job  # it holds the pages


class HostPages:
    """All pages of all layers, in the host's memory.

    Attributes:
        rows: `[2, layers, batch * kv_heads * pages, words]` uint64: keys, then values.
        threads: how many gather.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: DTypeLike, chosen: int, threads: int = 0
    ):
        """Make room for the pages, and for two blocks of those chosen.

        Args:
            shape: `[layers, batch, kv_heads, pages, head_dim]`.
            dtype: of keys and values.
            chosen: pages of each kv head that a step sends.
            threads: that gather; 0: one, until `choose_threads`.
        """
        layers, self._batch, self._kv_heads, self._pages, head_dim = shape
        words = PAGE_TOKENS * head_dim * np.dtype(dtype).itemsize // WORD.itemsize
        heads = self._batch * self._kv_heads
        self.rows = np.empty((PARTS, layers, heads * self._pages, words), WORD)
        self._first = (np.arange(heads) * self._pages).reshape(self._batch, self._kv_heads, 1)
        size = self._batch, self._kv_heads, chosen * PAGE_TOKENS, head_dim
        # One pair to fill while the last one may be on its way.
        self._blocks = [[Block(size, dtype, words) for _ in range(PARTS)] for _ in range(2)]
        self._rng = np.random.default_rng(0)
        self._counts = heads, chosen
        self.threads = threads or 1
        # Beside the caller's own thread. Queues in C: a layer's gathering takes some 0.3 ms.
        self._done: list[SimpleQueue[Exception | None]] = [SimpleQueue() for _ in range(PARTS)]
        self._helpers: list[SimpleQueue[Job | None]] = []
        for _ in range(max(threads, os.cpu_count() or 1) - 1):
            self._helpers.append(SimpleQueue())
            queues = self._helpers[-1], self._done
            threading.Thread(target=_help, args=queues, daemon=True).start()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.rows.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes that a layer sends."""
        return sum(block.words.nbytes for block in self._blocks[0])

    @property
    def pinned(self) -> bool:
        """Whether the blocks are pinned."""
        return all(block.pinned for pair in self._blocks for block in pair)

    @property
    def not_pinned(self) -> str | None:
        """Why blocks are not pinned; None if all are."""
        failures = [block.failure for pair in self._blocks for block in pair if not block.pinned]
        return failures[0] if failures else None

    def put(self, layer: int, sequence: int, keys: Array, values: Array) -> None:
        """Write one sequence's pages in one layer, `[kv_heads, pages, 16, head_dim]` each."""
        count = self._kv_heads * self._pages
        for part, new in enumerate((keys, values)):
            rows = self.rows[part, layer, sequence * count : (sequence + 1) * count]
            rows.reshape(-1)[:] = np.ascontiguousarray(np.asarray(new)).reshape(-1).view(WORD)

    def send(self, layer: int, ids: np.ndarray) -> tuple[Array, Array, float]:
        """Gather pages and send them.

        Args:
            layer: which layer.
            ids: `[batch, kv_heads, chosen]` int32, pages of each kv head.

        Returns:
            keys and values, `[batch, kv_heads, chosen * 16, head_dim]` each, on their way to the
            device; and the seconds that the gathering took, the sending of the keys among them.
        """
        start = time.perf_counter()
        self._blocks.reverse()
        pair = self._blocks[0]
        for block in pair:
            block.wait()
        sent = []
        for block, _ in zip(pair, self._gather(layer, ids, pair), strict=True):
            seconds = time.perf_counter() - start
            sent.append(block.send())
        return sent[0], sent[1], seconds

    def _gather(self, layer: int, ids: np.ndarray, pair: list[Block]) -> Iterator[None]:
        """Fill the blocks, keys first; yield as each is full."""
        places = (self._first + ids).reshape(-1)
        ends = np.linspace(0, len(places), self.threads + 1).astype(int)
        own, *others = (slice(*each) for each in itertools.pairwise(ends))

        def copy(part: int, share: slice) -> None:
            # Numpy lets other threads run meanwhile. "clip" only because it else copies first.
            out = pair[part].words[share]
            np.take(self.rows[part, layer], places[share], 0, out, "clip")

        for helper, share in zip(self._helpers, others, strict=False):
            helper.put(functools.partial(copy, share=share))
        for part, done in enumerate(self._done):
            copy(part, own)
            for _ in others:
                if (error := done.get()) is not None:
                    raise error
            yield

    def choose_threads(self) -> dict[int, float]:
        """Find the number of threads that gathers fastest, and keep it.

        Returns:
            bytes a second for each number that was tried.
        """
        found, most = {}, os.cpu_count() or 1
        for threads in sorted({min(2**i, most) for i in range(6)}):
            self.threads = threads
            seconds = []
            for trial in range(TRIALS + 1):
                ids, layer = self._random_ids(), trial % self.rows.shape[1]
                start = time.perf_counter()
                list(self._gather(layer, ids, self._blocks[0]))
                seconds.append(time.perf_counter() - start)
            found[threads] = self.block_bytes / min(seconds[1:])
        self.threads = max(found, key=lambda threads: found[threads])
        return found

    def _random_ids(self) -> np.ndarray:
        heads, chosen = self._counts
        drawn = [self._rng.choice(self._pages, chosen, replace=False) for _ in range(heads)]
        return np.sort(drawn, axis=-1).astype(np.int32).reshape(*self._first.shape[:2], chosen)

    def send_rate(self) -> float:
        """Return the bytes a second at which the blocks alone reach the device."""
        seconds = []
        for _ in range(TRIALS + 1):
            start = time.perf_counter()
            jax.block_until_ready([block.send() for block in self._blocks[0]])
            seconds.append(time.perf_counter() - start)
        return self.block_bytes / min(seconds[1:])

    def close(self) -> None:
        """End the helpers."""
        for helper in self._helpers:
            helper.put(None)


def round_trip() -> float:
    """Return the seconds from a small program's call until numpy has its result."""
    program: Any = jax.jit(lambda x: x + 1)
    x, seconds = jnp.zeros(64, jnp.int32), []
    for _ in range(20):
        start = time.perf_counter()
        x = program(x)
        x.copy_to_host_async()
        np.asarray(x)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
