"""Run records: the figures that README and docs show, with where they come from.

A record is a JSON file of `docs/lab/runs`. `docs/lab/README.md` says what its fields hold.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "docs/lab/runs"
TRANSCRIBED = "transcribed from "  # a source that is a page, as the run's own file is gone


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        date: of the run, UTC, as ISO 8601 writes it; of several days, both.
        device: the accelerators, and what else of the machine counts.
        commit: of the measured code; of a transcribed record, the one that wrote the figures down.
            None where nobody knows it.
        versions: of jax and Python; empty where nobody knows them.
        command: which made the figures.
        source: the command's own output, or "transcribed from PAGE".
        conditions: model, sizes, dtype and units.
        figures: numbers, in objects by name.

    Raises:
        ValueError: a field is of another type, or a record that is not transcribed lacks its commit
            or its versions.
    """

    date: str
    device: str
    commit: str | None
    versions: dict[str, str]
    command: str
    source: str
    conditions: str
    figures: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("date", "device", "command", "source", "conditions"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a text that is not empty")
        if not isinstance(self.figures, dict) or not self.figures:
            raise ValueError("figures must be an object that is not empty")
        for number in leaves(self.figures):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"figures hold {number!r}; they must be numbers")
        if not self.source.startswith(TRANSCRIBED) and not (self.commit and self.versions):
            raise ValueError("a run that was not transcribed needs its commit and its versions")

    def __getitem__(self, path: str) -> Any:
        """Return the figure, or the object of figures, at `a/b/c`."""
        value: Any = self.figures
        for name in path.split("/"):
            value = value[name]
        return value

    @property
    def page(self) -> str | None:
        """The page that the record was transcribed from, from the root; None if it was not."""
        is_copy = self.source.startswith(TRANSCRIBED)
        return self.source.removeprefix(TRANSCRIBED) if is_copy else None


def leaves(figures: Any) -> list[Any]:
    """All values of nested objects, in order."""
    if not isinstance(figures, dict):
        return [figures]
    return [leaf for value in figures.values() for leaf in leaves(value)]


def read_runs(folder: Path = RUNS) -> dict[str, RunRecord]:
    """Read all records of a folder, by file name without its ending.

    Raises:
        ValueError: a file is no record; the message begins with its name.
    """
    runs = {}
    for file in sorted(folder.glob("*.json")):
        try:
            runs[file.stem] = RunRecord(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file.name}: {error}") from error
    return runs
