"""A folder of kept documents with a limit of size: the least recently used ones go first.

Several processes may use one folder. What a process reads or writes it holds a lease of, which ends
with it; only what nobody holds is removed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from models.errors import InputError
from models.parameters import Params
from models.paths import names_in
from models.text.tokenizer import Tokenizer
from wavejax.documents.document import Document, load_document, save_document
from wavejax.documents.files import LOCK, MANIFEST, Folder, read_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints
from wavejax.documents.leases import is_held, lease
from wavejax.engine.checks import as_prompts, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.state import DecodeState

_NEW, _OLD = ".new-", ".old-"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A document in a cache.

    Attributes:
        path: its folder.
        nbytes: on disk.
        used: when it was last asked for, in nanoseconds of the file system's clock.
    """

    path: Path
    nbytes: int
    used: int


class DocumentCache:
    """Kept documents, found by the tokens that a prompt begins with.

    Args:
        folder: made if it is not there. None is `wavejax/documents` in the user's cache folder.
        max_bytes: what all documents may take together. While one is written, it comes on top.

    Raises:
        InputError: `max_bytes` is no whole number above 0, or the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: int = 2**36):
        self.max_bytes = whole_number("max_bytes", max_bytes, 1)
        if folder is None:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = caches / "wavejax" / "documents"
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made: {error.strerror}") from None

    def entries(self) -> list[Entry]:
        """List the documents, the most recently used first."""
        found = []
        for name in names_in(self.folder):
            if name.startswith("."):
                continue
            # What another process removes meanwhile is no longer there.
            with contextlib.suppress(InputError, OSError):
                path = self.folder / name
                used = (path / MANIFEST).stat().st_mtime_ns
                found.append(Entry(path, read_folder(path).nbytes, used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    @contextlib.contextmanager
    def find(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        generator: Generator,
        params: Params,
        tokenizer: Tokenizer | None = None,
        weights: str | None = None,
    ) -> Iterator[Document | None]:
        """Open the document that saves a prompt the most tokens; None where none saves any.

        No process removes it before the block ends: start or insert it in there. (Rows that are
        staged may arrive after the block: their files are open by then.)

        Args:
            prompt: token ids.
            generator, params, tokenizer, weights: as of `load_document`; documents of others are
                passed over.
        """
        tokens = as_prompts([prompt], generator.model_config.vocab_size)[0]
        now = fingerprints(generator.model_config, params, generator.attention, tokenizer, weights)
        with contextlib.ExitStack() as stack:
            path = self._best(tokens, now, stack)
            if path is None:
                yield None
                return
            given = {"generator": generator, "params": params, "tokenizer": tokenizer}
            yield load_document(path, weights=now["weights"], **given)  # type: ignore[arg-type]

    def keep(
        self,
        state: DecodeState,
        *,
        generator: Generator,
        params: Params,
        token_ids: Sequence[int] | np.ndarray,
        slot: int = 0,
        tokenizer: Tokenizer | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Path | None:
        """Keep what a sequence has read, and remove what was used least lately.

        Args:
            state, generator, params, token_ids, slot, tokenizer, facts: as of `save_document`.

        Returns:
            the document's folder: one of the same tokens where there is one. None where it alone
            takes more than `max_bytes`.

        Raises:
            InputError: as `save_document`.
        """
        tokens = as_prompts([token_ids], generator.model_config.vocab_size)[0]
        now = fingerprints(generator.model_config, params, generator.attention, tokenizer)

        def write(path: Path) -> None:
            given = {"generator": generator, "params": params, "tokenizer": tokenizer}
            given |= {"token_ids": tokens, "slot": slot, "facts": facts, "weights": now["weights"]}
            save_document(state, path, **given)  # type: ignore[arg-type]

        said = json.dumps(now, sort_keys=True).encode()
        name = hashlib.sha256(said + np.asarray(tokens, "<i4").tobytes()).hexdigest()[:32]
        return self.add(name, write)

    def add(self, name: str, write: Callable[[Path], None]) -> Path | None:
        """Add a document under a name, unless there is one; see `keep`.

        Args:
            name: of its folder.
            write: writes the folder that it is given.
        """
        path = self.folder / name
        if self._touch(path):
            return path
        new = self.folder / f"{_NEW}{secrets.token_hex(8)}"
        with lease(new):
            try:
                write(new)
                nbytes = read_folder(new).nbytes
                if nbytes > self.max_bytes:
                    return None
                with self._lock():
                    self._evict(self.max_bytes - nbytes)
                    if not self._touch(path):  # another process may have been faster
                        (new / LOCK).unlink(missing_ok=True)
                        new.rename(path)
                self._remove_old()
                return path
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def evict(self, max_bytes: int | None = None) -> None:
        """Remove the least recently used documents that nobody holds, down to a size.

        Args:
            max_bytes: None for the cache's limit; 0 removes all.
        """
        with self._lock():
            self._evict(self.max_bytes if max_bytes is None else max_bytes)
        self._remove_old()

    def _best(
        self, tokens: np.ndarray, now: dict[str, Any], stack: contextlib.ExitStack
    ) -> Path | None:
        found: list[tuple[int, Path]] = []
        for entry in self.entries():
            with contextlib.suppress(InputError, OSError):
                folder = read_folder(entry.path)
                check_fingerprints("", folder.facts["fingerprints"], now)
                reused = _document(folder).reused(tokens)
                if reused:
                    found.append((reused, entry.path))
        for _, path in sorted(found, key=lambda one: one[0], reverse=True):
            with self._lock():
                if self._touch(path):
                    stack.enter_context(lease(path))
                    return path
        return None

    def _evict(self, limit: int) -> None:
        """Rename what is to go, with the lock held; the most recently used stay."""
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in reversed(entries):
            if total > limit and not is_held(entry.path):
                with contextlib.suppress(OSError):
                    entry.path.rename(self.folder / f"{_OLD}{secrets.token_hex(8)}")
                    total -= entry.nbytes

    def _remove_old(self) -> None:
        """Remove what was renamed, and what killed processes had not finished."""
        for name in names_in(self.folder):
            path = self.folder / name
            unfinished = name.startswith(_NEW) and path.is_dir() and not is_held(path)
            if name.startswith(_OLD) or unfinished:
                shutil.rmtree(path, ignore_errors=True)

    def _touch(self, path: Path) -> bool:
        """Note that a document is used now; gives whether there is one."""
        try:
            os.utime(path / MANIFEST)
        except OSError:
            return False
        return True

    def _lock(self) -> filelock.FileLock:
        """For what takes no time: to see what is held, and to rename."""
        return filelock.FileLock(self.folder / LOCK)


def _document(folder: Folder) -> Document:
    return Document(folder, {}, folder.arrays["token_ids"].read())
