"""A shelf of documents: a folder of kept ones, opened by name for one model, and kept open."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.errors import InputError
from models.parameters import Params
from models.paths import is_file, names_in, stat_of
from models.text.tokenizer import Tokenizer
from wavejax.documents.document import Document
from wavejax.documents.files import MANIFEST, Folder, read_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints
from wavejax.documents.prefix import reusable
from wavejax.documents.stored_arrays import StoredArray
from wavejax.engine.generator import Generator

_CHECKERS = 4  # Files that are checked at a time: their checksums are the processor's work.
Version = tuple[int, int]


class DocumentNotFound(InputError):
    """There is no document of that name."""


@dataclasses.dataclass(frozen=True, eq=False)
class MappedArray(StoredArray):
    """An array that was checked, and stays mapped; on POSIX also after its file was removed.

    Attributes:
        array: as of `StoredArray.map`.
    """

    array: np.ndarray

    def map(self) -> np.ndarray:
        """Return the array."""
        return self.array

    def check(self) -> None:
        """Nothing: it was checked."""


@dataclasses.dataclass(frozen=True)
class _Listed:
    """A document that was looked at: which of its versions, and whether it can be used."""

    version: Version
    token_ids: np.ndarray
    fits: bool


class Shelf:
    """Documents of one folder, each a subfolder, opened for one model. Safe for several threads.

    A document is checked whole when it is opened, and stays open, mapped. One that was replaced
    meanwhile is opened anew.

    Args:
        folder: of the documents; new ones may come at any time.
        generator: what is to go on with them.
        params: the model's parameters: their fingerprint is taken now.
        tokenizer: the model's.
        most_open: how many stay open, the most recently used.

    Raises:
        InputError: the folder is not there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        generator: Generator,
        params: Params,
        tokenizer: Tokenizer,
        most_open: int = 8,
    ):
        self.folder = Path(folder)
        check_shelf(self.folder)
        given = generator.model_config, params, generator.attention, tokenizer
        self._now = fingerprints(*given)
        self._most = most_open
        self._lock = threading.Lock()  # guards what follows
        self._opening: dict[str, threading.Lock] = {}
        self._open: collections.OrderedDict[str, tuple[Version, Document]] = (
            collections.OrderedDict()
        )
        self._listed: dict[str, _Listed] = {}

    def names(self) -> list[str]:
        """List the documents there are."""
        return sorted(
            name
            for name in names_in(self.folder)
            if not name.startswith(".") and is_file(self.folder / name / MANIFEST)
        )

    def open(self, name: str) -> Document:
        """Open a document; its first time takes as long as its files take to be read.

        Args:
            name: of its folder. It is looked up among the names there are: no path leads elsewhere.

        Raises:
            DocumentNotFound: there is none.
            InputError: it is damaged, or was kept with another model or settings: the message says
                what differs, and does not tell where the folder is.
        """
        if name not in self.names():
            raise DocumentNotFound(f"there is no document {name!r} here")
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:
            version = self._version(name)
            with self._lock:
                held, document = self._open.get(name, (None, None))
                if document is not None and held == version:
                    self._open.move_to_end(name)
                    return document
            document = self._load(name)
            with self._lock:
                self._open[name] = version, document
                self._open.move_to_end(name)
                while len(self._open) > self._most:
                    self._open.popitem(last=False)
            return document

    def best(self, prompt: Sequence[int] | np.ndarray) -> Document | None:
        """Open the document that saves a prompt the most tokens, half of them at least.

        Those of other models, and damaged ones, are passed over.

        Args:
            prompt: token ids.
        """
        tokens, found = np.asarray(prompt), list[tuple[int, str]]()
        for name in self.names():
            # What is removed meanwhile is no longer there.
            with contextlib.suppress(InputError, OSError):
                listed = self._look_at(name)
                reused = reusable(listed.token_ids, tokens)
                if listed.fits and 2 * reused >= len(tokens):
                    found.append((reused, name))
        for _, name in sorted(found, reverse=True):
            with contextlib.suppress(InputError, OSError):
                return self.open(name)
        return None

    def _version(self, name: str) -> Version:
        found = stat_of(self.folder / name / MANIFEST)
        if found is None:
            raise DocumentNotFound(f"there is no document {name!r} here")
        return found.st_ino, found.st_mtime_ns

    def _look_at(self, name: str) -> _Listed:
        """Read a document's token ids, once for each version of it."""
        version, known = self._version(name), self._listed.get(name)
        if known is not None and known.version == version:
            return known
        folder, fits = read_folder(self.folder / name), True
        try:
            check_fingerprints(name, folder.facts["fingerprints"], self._now)
        except InputError:
            fits = False
        listed = _Listed(version, folder.arrays["token_ids"].read(), fits)
        with self._lock:
            self._listed[name] = listed
        return listed

    def _load(self, name: str) -> Document:
        path, told = self.folder / name, f"document {name!r}"
        try:
            folder = read_folder(path)
            check_fingerprints(told, folder.facts["fingerprints"], self._now)
            folder = mapped(folder)
        except InputError as error:
            raise InputError(str(error).replace(str(path), told)) from error
        return Document(folder, self._now, folder.arrays["token_ids"].read())


def check_shelf(folder: Path) -> None:
    """Raise InputError where there is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one that holds kept documents")


def mapped(folder: Folder) -> Folder:
    """Check all arrays of a folder, and keep them mapped; raises InputError as `read` does."""
    with concurrent.futures.ThreadPoolExecutor(_CHECKERS) as pool:
        found = list(pool.map(StoredArray.read, folder.arrays.values()))
    held: dict[str, StoredArray] = {
        name: MappedArray(one.file, one.shape, one.dtype, one.bytes, one.crc32, array)
        for (name, one), array in zip(folder.arrays.items(), found, strict=True)
    }
    return dataclasses.replace(folder, arrays=held)
