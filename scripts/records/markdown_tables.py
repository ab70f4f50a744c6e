"""What the tables of README and docs are written with."""

from collections.abc import Iterable, Mapping

from run_records import RunRecord

Runs = Mapping[str, RunRecord]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def dated(runs: Runs, *names: str) -> str:
    """Return the line below a table: each record's device and day."""
    found: dict[str, list[str]] = {}
    for name in names:
        device, day = runs[name].device.split(",")[0], runs[name].date.split("T")[0]
        found.setdefault(f"On {device}, {day}", []).append(f"`{name}`")
    return "\n" + " ".join(f"{where}: {', '.join(each)}." for where, each in found.items()) + "\n"


def times(slow: float, fast: float) -> str:
    """How many times as fast, to three digits at most."""
    ratio = slow / fast
    return f"{ratio:.2f}x" if ratio < 3 else f"{ratio:.1f}x"


def interval(figures: Mapping[str, float], digits: int = 2) -> str:
    """Return a difference with the half width of its 95 % interval."""
    return f"{figures['difference']:+.{digits}f} ± {figures['interval']:.{digits}f}"


def plain(number: str) -> str:
    """Return a number without an exponent."""
    return f"{float(number):.5f}".rstrip("0") if "e" in number else number
