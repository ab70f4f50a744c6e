"""An evaluation's folder: what it is of, and one JSON line for each sample and method."""

import contextlib
import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError
from wavejax.evaluation.files import append_lines, write_text

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

    A context, within which no other run can use the folder. Records are appended, and never written
    anew: no end of a run costs one that is there.

    Args:
        folder: made if it is not there.
        settings: what decides all figures; an evaluation goes on only under the same.
        run: facts of this run, for the reader: versions, the device.
        parts: what decides some of the figures, such as those of one task; an evaluation goes on
            only where those that it knows already are the same.

    Raises:
        InputError: the folder cannot be used, is another run's that goes on, or holds an evaluation
            with other settings or parts.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        run: dict[str, Any],
        parts: dict[str, Any] | None = None,
    ):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                # Two runs would each write what the other one has written.
                lock = opened.enter_context((folder / LOCK).open("w"))
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check(settings, parts or {}, run)
                self.records = list(self._read())
                (folder / RECORDS).touch()
                self._locked = opened.pop_all()
        except BlockingIOError as error:
            raise InputError(
                f"another run writes to {folder}: wait for its end, or give another `out`"
            ) from error
        except OSError as error:
            raise InputError(f"cannot use the folder {folder}: {error.strerror}") from error
        self.done = {key_of(record) for record in self.records}
        self._samples = {key_of(one)[:3]: one["sample"] for one in self.records if "sample" in one}

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._locked.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records of which none is there yet: all of them, or none; raise InputError."""
        new = list(records)
        lines = [json.dumps(record, ensure_ascii=False) for record in new]
        append_lines(self.folder / RECORDS, lines)
        self.records += new
        self.done |= {key_of(record) for record in new}
        self._samples |= {key_of(one)[:3]: one["sample"] for one in new if "sample" in one}

    def check_sample(self, task: str, length: int, index: int, sample: str) -> None:
        """Raise InputError where records are there that were made of another sample.

        Args:
            task: of which task the sample is.
            length: its tokens.
            index: its number.
            sample: what tells it from others, as in the records' field `sample`.
        """
        there = self._samples.get((task, length, index), sample)
        if there != sample:
            raise InputError(
                f"{self.folder} holds records of another sample {index} of {task} at {length} "
                f"tokens ({there}, not {sample}): give another `out`"
            )

    def _check(self, settings: dict[str, Any], parts: dict[str, Any], run: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                runs, there = [*known["runs"]], {**known["settings"]}
                known_parts = {**known.get("parts", {})}
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path} does not hold an evaluation's settings: give another `out`, or remove "
                    "it to go on with the records beside it"
                ) from None
            self._refuse_others(there, settings, sorted(settings.keys() | there.keys()))
            self._refuse_others(known_parts, parts, sorted(parts.keys() & known_parts.keys()))
            parts = known_parts | parts
        stamp = datetime.datetime.now(datetime.UTC).date().isoformat()
        runs.append(run | {"date": stamp})
        content = {"settings": settings, "parts": parts, "runs": runs}
        write_text(path, json.dumps(content, indent=1) + "\n")

    def _refuse_others(self, there: dict[str, Any], here: dict[str, Any], names: list[str]) -> None:
        for name in names:
            # As they are read back: a tuple is then a list.
            given = json.loads(json.dumps(here.get(name)))
            if there.get(name) == given:
                continue
            what, old, new = _difference(name, there.get(name), given)
            said = f"whose {what} is {old!r}, not {new!r}"
            if old is None:
                said = f"that says nothing of its {what}, which is {new!r} here"
            elif new is None:
                said = f"whose {what} is {old!r}, and nothing here"
            raise InputError(
                f"{self.folder} holds an evaluation {said}: give another `out`, or the same "
                "settings to go on with it"
            )

    def _read(self) -> Iterator[dict[str, Any]]:
        path = self.folder / RECORDS
        if not path.exists():
            return
        content = path.read_bytes()
        size = content.rfind(b"\n") + 1
        rest = content[size:]
        if _record_of(rest) is not None:
            # Whole but for its end: a run was stopped there, or somebody wrote to the file.
            append_lines(path, [""])
        elif rest:
            # It was being written when the run was stopped. Cut off: that takes no room.
            with path.open("r+b") as file:
                file.truncate(size)
            content = content[:size]
        for number, line in enumerate(content.splitlines(), 1):
            record = _record_of(line)
            if record is None:
                raise InputError(
                    f"line {number} of {path} is not a record: remove it to go on with the others, "
                    "or give another `out`"
                )
            yield record


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a folder, whosever it is, and write nothing.

    Args:
        folder: of an evaluation.

    Returns:
        the content of its settings' file, and its records; a line begun is none.

    Raises:
        InputError: it holds no evaluation.
    """
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        lines = (folder / RECORDS).read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no evaluation: name a folder with {SETTINGS} and {RECORDS}, as "
            "scripts/evaluate.py writes them"
        ) from error
    found = [record for record in map(_record_of, lines) if record is not None]
    if not isinstance(content, dict) or "settings" not in content or not found:
        raise InputError(f"{folder} holds no record of an evaluation: name another folder")
    return content, found


def _record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record that a line is, if it is one."""
    try:
        record = json.loads(line)
        key_of(record)
    except (ValueError, KeyError, TypeError):
        return None
    return record


def _difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Of settings that differ what to name, and both values; of a group the first that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for inner in sorted(there.keys() | here.keys()):
            if there.get(inner) != here.get(inner):
                return f"{name}.{inner}", there.get(inner), here.get(inner)
    return name, there, here


def key_of(record: dict[str, Any]) -> Key:
    """Return what a record is of: task, length, index of the sample, method."""
    return record["task"], record["length"], record["index"], record["method"]


def blocks(samples: int, batch: int, *, even: bool = True) -> Sequence[range]:
    """Return the samples' indices in batches of one size; the last one may reach past `samples`.

    Args:
        samples: how many there are.
        batch: the most in a batch.
        even: batches are no larger than makes as many of them; else all are of `batch`, so that a
            sample's neighbours do not depend on `samples`.
    """
    count = -(-samples // batch)
    size = -(-samples // count) if even else batch
    return [range(i * size, (i + 1) * size) for i in range(count)]
