"""Stop strings: texts that end an answer, wherever the borders of its tokens are."""

from collections.abc import Sequence

from models.errors import InputError


class StopStrings:
    """Looks for stop strings in a text that comes in pieces; what may begin one is held back.

    The first to be complete counts; of several that are at the same character, the longest. How the
    text is cut into pieces makes no difference.

    Args:
        stops: the strings; none of them empty.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stop strings are {stops!r}; expected texts, none of them empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._found = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns the text that can be shown now, and whether a stop string was found: the text then
        ends where it begins, and every later call returns `("", True)`.
        """
        if self._found:
            return "", True
        text = self._held + piece
        # (end, start) of each one's first occurrence; what was held back holds none whole.
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self._held, self._found = "", True
            return text[: min(ends)[1]], True
        cut = self._first_open(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Return what was held back, at the text's end: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, text: str) -> int:
        """Where the first stop string may have begun; the text's length if none has."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
