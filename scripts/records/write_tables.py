"""Writes the tables of README and docs from the run records of docs/lab/runs.

    python scripts/records/write_tables.py          # writes
    python scripts/records/write_tables.py --check  # says what differs; status 1 if anything does

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. All else is left alone.
"""

import argparse
import re
import sys
from pathlib import Path

from markdown_tables import Runs
from run_records import ROOT, read_runs
from tables import TABLES

MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_tables(text: str, runs: Runs) -> str:
    """Return a page's text with each table made anew.

    Raises:
        KeyError: a table has no maker, or a record or a figure is missing.
    """

    def make(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]](runs) + match[3]

    return MARKED.sub(make, text)


def main() -> int:
    """Run the command; return its status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    arguments = parser.parse_args()
    runs, stale = read_runs(), []
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = with_tables(old, runs)
        if new == old:
            continue
        stale.append(page)
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'differs' if arguments.check else 'written'}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
