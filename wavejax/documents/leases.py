"""Leases: a name that a process holds; the system lets go of it when the process ends.

By `filelock`, which tokenizers brings with it: locks of the system where it has them.
"""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import filelock

from models.paths import names_in

_MARK = ".lease-"


@contextlib.contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold a path until the block ends: `is_held` says so, in every process.

    Several may hold one path at a time. Nothing needs to be at it.

    Args:
        path: whose lease lies beside it.
    """
    file = path.with_name(f".{path.name}{_MARK}{secrets.token_hex(8)}")
    lock = filelock.FileLock(file)
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a living process holds a path. Removes what dead ones left."""
    held = False
    for name in names_in(path.parent):
        if name.startswith(f".{path.name}{_MARK}"):
            file = path.with_name(name)
            try:
                with filelock.FileLock(file, timeout=0):
                    file.unlink(missing_ok=True)
            except filelock.Timeout:
                held = True
    return held
