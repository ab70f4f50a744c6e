"""An evaluation's folder: what it is of, and one JSON line for each sample and method."""

import contextlib
import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError

try:
    import fcntl
except ImportError:  # On Windows nothing is locked.
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, int, int, str]
RECORDS = "records.jsonl"
SETTINGS = "settings.json"
LOCK = ".lock"


class Records:
    """The records in a folder, from which a stopped evaluation goes on.

    A context, within which no other run can use the folder.

    Args:
        folder: made if it is not there.
        settings: what decides the figures; an evaluation goes on only under the same.
        run: facts of this run, for the reader: versions, the device.

    Raises:
        InputError: the folder cannot be used, is another run's that goes on, or holds an evaluation
            with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], run: dict[str, Any]):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                # Two runs would each write what the other one has written.
                lock = opened.enter_context((folder / LOCK).open("w"))
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check(settings, run)
                self.records = list(self._read())
                (folder / RECORDS).touch()
                self._locked = opened.pop_all()
        except BlockingIOError as error:
            raise InputError(
                f"another run writes to {folder}: wait for its end, or give another --out"
            ) from error
        except OSError as error:
            raise InputError(f"cannot use the folder {folder}: {error.strerror}") from error
        self.done = {key_of(record) for record in self.records}

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._locked.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes records of which none is there yet."""
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self.records.append(record)
                self.done.add(key_of(record))

    def _check(self, settings: dict[str, Any], run: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        runs = []
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                known["settings"], known["runs"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path} does not hold an evaluation's settings: give another --out, or remove "
                    "it to go on with the records beside it"
                ) from None
            for name in sorted(settings.keys() | known["settings"].keys()):
                there, here = known["settings"].get(name), settings.get(name)
                if there != here:
                    what, there, here = _difference(name, there, here)
                    raise InputError(
                        f"{self.folder} holds an evaluation whose {what} is {there!r}, not "
                        f"{here!r}: give another --out, or the same settings to go on with it"
                    )
            runs = known["runs"]
        stamp = datetime.datetime.now(datetime.UTC).date().isoformat()
        runs.append(run | {"date": stamp})
        text = json.dumps({"settings": settings, "runs": runs}, indent=1)
        # What is there stays whole if this is interrupted.
        fresh = path.with_suffix(".new")
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(path)

    def _read(self) -> Iterator[dict[str, Any]]:
        path = self.folder / RECORDS
        if not path.exists():
            return
        content = path.read_bytes()
        # What follows the last line's end was being written when the run was stopped.
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for line in whole.splitlines():
            yield json.loads(line)


def _difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Of settings that differ what to name, and both values; of a group the first that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for inner in sorted(there.keys() | here.keys()):
            if there.get(inner) != here.get(inner):
                return f"{name}.{inner}", there.get(inner), here.get(inner)
    return name, there, here


def key_of(record: dict[str, Any]) -> Key:
    """What a record is of: task, length, index of the sample, method."""
    return record["task"], record["length"], record["index"], record["method"]


def blocks(samples: int, batch: int) -> Sequence[range]:
    """The samples' indices in batches of one size; the last one may reach past `samples`."""
    count = -(-samples // batch)
    size = -(-samples // count)
    return [range(i * size, (i + 1) * size) for i in range(count)]
