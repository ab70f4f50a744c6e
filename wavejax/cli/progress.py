"""Progress bars, and numbers for reading."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(label: str, shown: bool) -> Iterator[Progress]:
    """Show a bar on stderr, gone when done; yield what to call with (done, total)."""
    with tqdm(desc=label, file=sys.stderr, leave=False, disable=not shown) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def bytes_text(count: int) -> str:
    """Return a number of bytes for reading: 1234567 is 1.2 MB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
