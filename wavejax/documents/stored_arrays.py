"""Arrays in files of NumPy's own format: written with a checksum, mapped, every byte checked."""

import collections
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from models.paths import stat_of

try:
    from zlib_ng.zlib_ng import crc32  # the same numbers, some ten times as fast
except ImportError:  # a checkout that runs without all that it depends on
    from zlib import crc32

BLOCK = 2**24  # Bytes written at a time.
_IN_CACHE = 2**20  # Bytes checked at a time: they are in the processor's cache after the read.
_WRITERS = 4  # Arrays that are written at a time, at most.
_WAITING = 2**31  # Bytes of arrays that are held for them, at most, but for the newest one's.
_SMALL = 4096  # Bytes of a file that is not worth mapping; an empty array cannot be.


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        file: its `.npy` file.
        shape: of the array.
        dtype: its name, as "bfloat16".
        bytes: of the file.
        crc32: of the file: any flipped byte changes it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    crc32: int

    def map(self) -> np.ndarray:
        """Map the array, unchecked but for its size.

        Raises:
            InputError: the file is missing, truncated, or no such array.
        """
        self._check_size()
        try:
            stored = np.load(self.file, mmap_mode="r" if self.bytes > _SMALL else None)
            array = stored.view(jnp.dtype(self.dtype))
        except Exception as error:  # of a damaged header NumPy raises whatever its parser does
            raise damaged(self.file, f"holds no such array ({type(error).__name__})") from None
        if array.shape != self.shape:
            raise damaged(self.file, f"has the shape {list(array.shape)}")
        return array

    def check(self) -> None:
        """Read the whole file; raises InputError where a byte is not what was written."""
        self._check_size()
        checksum, block = 0, memoryview(bytearray(min(_IN_CACHE, max(1, self.bytes))))
        try:
            with self.file.open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    checksum = crc32(block[:count], checksum)
        except OSError as error:
            raise damaged(self.file, f"cannot be read: {error.strerror}") from None
        if checksum != self.crc32:
            raise damaged(self.file, "is not what was written (its checksum differs)")

    def read(self) -> np.ndarray:
        """Check the array and map it; raises InputError as `check` and `map` do."""
        self.check()
        return self.map()

    def _check_size(self) -> None:
        found = stat_of(self.file)
        if found is None or found.st_size != self.bytes:
            there_is = "is missing" if found is None else f"has {found.st_size} bytes"
            raise damaged(self.file, f"{there_is}, expected {self.bytes}")


def write_arrays(
    folder: Path, arrays: Iterable[tuple[str, Callable[[], np.ndarray]]]
) -> dict[str, StoredArray]:
    """Write arrays in several threads: the next one is made while others go to the disk."""
    done: dict[str, StoredArray] = {}
    writing: collections.deque[tuple[str, int, concurrent.futures.Future[StoredArray]]]
    writing = collections.deque()

    def wait_for_first() -> None:
        name, _, future = writing.popleft()
        done[name] = future.result()

    with concurrent.futures.ThreadPoolExecutor(_WRITERS, "writers of a document") as pool:
        for name, make in arrays:
            while len(writing) >= _WRITERS or sum(size for _, size, _ in writing) > _WAITING:
                wait_for_first()
            array = np.asarray(make(), order="C")
            writing.append((name, array.nbytes, pool.submit(_write_array, folder, name, array)))
            del array  # held by its writer alone
        while writing:
            wait_for_first()
    return done


def _write_array(folder: Path, name: str, array: np.ndarray) -> StoredArray:
    file = folder / (name.replace("/", ".") + ".npy")
    plain = array
    if array.dtype.kind not in "biuf":  # one of ml_dtypes, which NumPy would not know again
        plain = array.view(f"u{array.dtype.itemsize}")
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, np.lib.format.header_data_from_array_1_0(plain))
    header = begin.getvalue()
    data = plain.reshape(-1).data.cast("B") if plain.size else memoryview(b"")
    checksum = crc32(header)
    with file.open("wb") as out:
        out.write(header)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            checksum = crc32(block, checksum)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    size = len(header) + len(data)
    return StoredArray(file, array.shape, array.dtype.name, size, checksum)


def damaged(file: Path, reason: str) -> InputError:
    """Say that a file is damaged, and how."""
    return InputError(f"{file} {reason}: the kept document is damaged; read the document again")
