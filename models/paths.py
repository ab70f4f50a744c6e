"""What is at a path that a user gave."""

import os
import stat
from pathlib import Path

from models.errors import InputError


def stat_of(path: Path, follow_symlinks: bool = True) -> os.stat_result | None:
    """What the system knows of a path, None if nothing is there; InputError if it will not tell.

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
