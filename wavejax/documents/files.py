"""A folder of arrays: written whole or not at all, mapped when read, every byte checked.

One `.npy` file an array, and `document.json`, which names them. NumPy's format is published and
stable, is read by mapping, and is written part by part, so that a large array is never held twice.
(safetensors' writer takes whole tensors as bytes; Orbax's files are compressed chunks, which cannot
be mapped, and its import takes seconds.) A dtype that NumPy lacks, as bfloat16, is stored as whole
numbers of its size.

The arrays lie in a subfolder of a name of its own. `document.json` is replaced last, by one rename:
until then an earlier document is whole, and what a killed process left is removed by the next save.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from models.errors import InputError
from models.paths import is_file, names_in, stat_of
from wavejax.documents.stored_arrays import StoredArray, damaged, write_arrays

MANIFEST, LOCK, ARRAYS = "document.json", ".lock", "arrays-"
FORMAT, VERSION = "wavejax-document", 1


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `document.json` says.

    Attributes:
        path: the document's folder.
        facts: what the writer said of it.
        arrays: by name.
    """

    path: Path
    facts: dict[str, Any]
    arrays: dict[str, StoredArray]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of arrays."""
        return sum(array.bytes for array in self.arrays.values())


def write_folder(
    path: Path, facts: Mapping[str, Any], arrays: Iterable[tuple[str, Callable[[], np.ndarray]]]
) -> None:
    """Write a document's folder, in place of the one that is there.

    Args:
        path: the folder; nothing, an empty folder or an earlier document may be there.
        facts: plain values, for `document.json`.
        arrays: names, as "index/centroids", and what makes each array: called one by one, while
            up to four before it are written.

    Raises:
        InputError: something else is at `path`, or the folder cannot be written, as on a full disk.
            An earlier document is then as it was, and nothing else is left.
    """
    refuse_other(path)
    made = not path.exists()
    folder = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            _remove_unnamed(path)
            folder = path / f"{ARRAYS}{secrets.token_hex(8)}"
            folder.mkdir()
            stored = write_arrays(folder, arrays)
            _sync(folder)
            listed = {
                name: {
                    "file": f"{folder.name}/{array.file.name}",
                    **{key: getattr(array, key) for key in ("shape", "dtype", "bytes", "crc32")},
                }
                for name, array in stored.items()
            }
            said = {"format": FORMAT, "version": VERSION, "facts": dict(facts), "arrays": listed}
            _write_manifest(path, said)
            folder = None  # it has its name in the manifest now
            _remove_unnamed(path)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if made and not is_file(path / MANIFEST):
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            hint = "; free some space, or name another disk" if _is_full(error) else ""
            raise InputError(f"{path} cannot be written: {reason}{hint}") from error
        raise


def read_folder(path: Path) -> Folder:
    """Read `document.json`; no array is looked at.

    Raises:
        InputError: there is no document at `path`, one of another version, or a damaged one.
    """
    file = path / MANIFEST
    if not is_file(file):
        raise InputError(f"{path} is no kept document: it has no {MANIFEST}; name one, or save one")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}")
        if said["version"] != VERSION:
            raise InputError(
                f"{path} is of version {said['version']}, this program reads version {VERSION}: "
                "read the document again"
            )
        if said.pop("sha256") != _digest(said):
            raise ValueError("its checksum differs")
        arrays = {
            name: StoredArray(
                path / one["file"], tuple(one["shape"]), one["dtype"], one["bytes"], one["crc32"]
            )
            for name, one in said["arrays"].items()
        }
        return Folder(path, said["facts"], arrays)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, f"is not what was written ({error})") from None


def refuse_other(path: Path) -> None:
    """Raise InputError where something is at `path` that is no document, nor an empty folder."""
    if stat_of(path, follow_symlinks=False) is None or is_file(path / MANIFEST):
        return
    names = set(names_in(path)) if path.is_dir() else {""}
    if any(name != LOCK and not name.startswith(ARRAYS) for name in names):
        raise InputError(f"{path} is there already and no kept document; name another folder")


def _write_manifest(path: Path, said: dict[str, Any]) -> None:
    said = json.loads(json.dumps(said))  # as it will be read
    text = json.dumps(said | {"sha256": _digest(said)}, indent=1, ensure_ascii=False) + "\n"
    unfinished = path / f".{MANIFEST}.unfinished"
    with unfinished.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(path / MANIFEST)
    _sync(path)


def _remove_unnamed(path: Path) -> None:
    """Remove the arrays that no manifest names: an earlier document's, or a killed process's."""
    named = set()
    if is_file(path / MANIFEST):
        try:
            named = {array.file.parent.name for array in read_folder(path).arrays.values()}
        except InputError:  # another version's, or damaged: for a whole one to replace
            return
    for name in names_in(path):
        if name.startswith(ARRAYS) and name not in named:
            shutil.rmtree(path / name, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of a killed one's lock."""
    with filelock.FileLock(path / LOCK):
        yield


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Have the system write a folder's names to the disk, where it can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
