"""Writes results so that a full disk or an interruption never costs what was there before."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from models.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Return a path to write a file's new content to; it takes the file's place once it is whole.

    It ends as `path` does, for writers that look at that. Of a device or a pipe, `path` itself.

    Raises:
        InputError: the content cannot be written, as on a full disk; what was there is there still.
    """
    target = path.resolve()  # a link stays one
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())  # a disk may say only now that it is full
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a whole file in UTF-8; see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_growing(path: Path, text: str, *, whole: bool) -> None:
    """Write results as they come: to `NAME.unfinished.SUFFIX` beside `path` until all are there.

    A run that is stopped thus leaves what it found, and what an earlier one wrote to `path`.
    """
    unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    if not whole:
        write_text(unfinished, text)
        return
    write_text(path, text)
    with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines, all of them or none; raise InputError as `replacing` does."""
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(before)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return what to say where a file cannot be written."""
    return InputError(
        f"cannot write {path}: {error.strerror or error}; what was written before is kept"
    )
