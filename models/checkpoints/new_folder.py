"""A folder that appears under its name only once it is complete."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from models.errors import InputError
from models.paths import names_in, stat_of

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process left stays
    fcntl = None  # type: ignore[assignment]

# Ctrl-C, a batch system's end, a terminal that is closed.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder, and those above it, by filling another one beside it and renaming that.

    Whatever `fill` raises, a signal's exception included, nothing is left. What a killed process
    leaves, `remove_unfinished` removes. Nothing is touched that another process made: a folder
    that appears at `folder` meanwhile stays, empty or not.

    Args:
      folder: nothing may be there.
      fill: called with the unfinished folder, which is empty.

    Raises:
      InputError: there is something at `folder`.
      OSError: a folder cannot be made or renamed.
    """
    refuse_existing(folder)
    parents: list[Path] = []
    unfinished: list[_Unfinished] = []
    try:
        with signals_put_off():
            _make_parents(folder, parents)
            unfinished.append(_Unfinished(folder))
            unfinished[0].folder.mkdir()
        fill(unfinished[0].folder)
        with signals_put_off():
            _give_name(unfinished[0].folder, folder)
            unfinished[0].release()
    except BaseException:
        with signals_put_off():
            for made in unfinished:
                made.remove()
            for parent in reversed(parents):
                with contextlib.suppress(OSError):  # what is not empty stays
                    parent.rmdir()
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left that were killed while they made `folder`.

    What belongs to a living process stays, and so does all that `make_folder` did not make, or of
    which the file system will not tell.
    """
    mine = re.compile(re.escape(_stem(folder)) + r"\d+-[0-9a-f]{8}\.lock")
    for name in names_in(folder.parent):
        if mine.fullmatch(name):
            lock = folder.with_name(name)
            with contextlib.suppress(OSError), _locked(lock) as is_mine:
                if is_mine and _remove(lock.with_suffix(""), attempts=1):
                    lock.unlink()


def refuse_existing(folder: Path) -> None:
    """InputError if there is anything at `folder`, or no telling."""
    if stat_of(folder, follow_symlinks=False) is not None:
        raise _exists(folder)


@contextlib.contextmanager
def signals_put_off() -> Iterator[None]:
    """Lets signals that Python handles, as Ctrl-C, take effect at the end and not before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals, or may say what becomes of them
        return
    arrived: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        arrived.append(number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    handled = {number: signal.getsignal(number) for number in numbers}
    handled = {number: handler for number, handler in handled.items() if callable(handler)}
    try:
        for number in handled:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


class _Unfinished:
    """A name beside a folder's, for it to be filled under, and a locked file that says whose.

    The system unlocks the file when its process ends, however it ends: what is locked is in use.
    (A process's number would not do: numbers are used again, and differ between containers.) The
    file is made first and removed last, so that nothing lies there without one.
    """

    def __init__(self, folder: Path):
        while True:
            name = f"{_stem(folder)}{os.getpid()}-{secrets.token_hex(4)}"
            self.folder = folder.with_name(name)
            self.lock_file = folder.with_name(f"{name}.lock")
            self._stack = contextlib.ExitStack()
            locked = _locked(self.lock_file, os.O_CREAT | os.O_EXCL, if_unknown=True)
            if self._stack.enter_context(locked):
                return
            self._stack.close()  # taken for a dead process's before it was locked

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.lock_file.unlink()
        self._stack.close()

    def remove(self) -> None:
        """Remove the folder. Where that fails, the file stays, so that it is tried once more."""
        if _remove(self.folder, attempts=50):
            self.release()
        else:
            self._stack.close()


@contextlib.contextmanager
def _locked(file: Path, flags: int = 0, if_unknown: bool = False) -> Iterator[bool]:
    """Open a file and try to lock it: give whether it is locked now, and still has its name.

    `if_unknown` is what is given where the file system knows no locks.
    """
    descriptor = os.open(file, os.O_RDWR | flags, 0o666)
    try:
        locked = _lock(descriptor)
        if locked:
            opened, there_is = os.fstat(descriptor), stat_of(file, follow_symlinks=False)
            yield (
                stat.S_ISREG(opened.st_mode)
                and there_is is not None
                and os.path.samestat(opened, there_is)
            )
        else:
            yield if_unknown and locked is None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether an open file is locked now; None where the system knows no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass
    return None


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make the folders above `folder` that are missing, and append to `made` what it made."""
    for parent in reversed(folder.parents):
        if stat_of(parent) is None:
            with contextlib.suppress(FileExistsError):  # another process was faster
                parent.mkdir()
                made.append(parent)


def _give_name(unfinished: Path, folder: Path) -> None:
    """Rename; InputError if there is something at `folder`."""
    # A rename would replace an empty folder that another process has just made: it may replace
    # only one that was made here. (On Windows it replaces none.)
    if os.name != "nt":
        try:
            folder.mkdir()
        except FileExistsError:
            raise _exists(folder) from None
    try:
        unfinished.rename(folder)
    except BaseException:
        with contextlib.suppress(OSError):  # if others have put something there, it stays
            folder.rmdir()
        raise


def _remove(folder: Path, attempts: int) -> bool:
    """Remove a folder that could not be completed; give whether it is gone."""
    for _ in range(attempts):
        shutil.rmtree(folder, ignore_errors=True)
        # Tensorstore's threads may write on for a moment, and make the folder anew.
        if attempts > 1:
            time.sleep(0.1)
        if not os.path.lexists(folder):
            return True
    return False


def _stem(folder: Path) -> str:
    # Cut, so that the longest name that a file system takes leaves room for the rest.
    return f".{folder.name[:40]}.unfinished-"


def _exists(folder: Path) -> InputError:
    return InputError(f"{folder} exists already; name a new folder or remove it first")
