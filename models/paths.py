"""What is at a path that a user gave."""

import os
import re
import stat
from pathlib import Path

from models.errors import InputError

# The second is the name that Git LFS had first; its pointers are still read.
_LFS_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)


def stat_of(path: Path, follow_symlinks: bool = True) -> os.stat_result | None:
    """Return what the system knows of a path, None if nothing is there.

    Raise InputError if it will not tell.

    `Path.exists` and its like raise or say no, as Python's version has it, where a folder may not
    be looked into or a name is too long.
    """
    try:
        return path.stat(follow_symlinks=follow_symlinks)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a ValueError: no path may hold a NUL
        reason = getattr(error, "strerror", error)
        raise InputError(f"cannot look at {path}: {reason}; name another path") from None


def is_file(path: Path) -> bool:
    """Whether there is a file; InputError if the system will not tell."""
    found = stat_of(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none where it cannot be looked into."""
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError):
        return []


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a file, fewer where it is shorter or cannot be read."""
    if not is_file(path):  # to open a pipe might wait for ever
        return b""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS holds in a large file's place."""
    return first_bytes(path, 64).startswith(_LFS_POINTERS)


def refuse_lfs_pointer(path: Path) -> None:
    """InputError if the file at `path` is a Git LFS pointer."""
    if is_lfs_pointer(path):
        size = re.search(rb"^size (\d{1,18})$", first_bytes(path, 1024), re.MULTILINE)
        of = f" of {int(size[1]):,} bytes" if size else ""
        raise InputError(
            f"{path} is a Git LFS pointer, not the file{of} that it stands for; run git lfs pull "
            "in its folder, or download the file itself"
        )


def refuse_stand_in(path: Path) -> None:
    """InputError if a file only stands for another: a Git LFS pointer, or a web page about it."""
    refuse_lfs_pointer(path)
    if first_bytes(path, 64).lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputError(
            f"{path} is a web page, not the file that the page is about; download the file itself"
        )
