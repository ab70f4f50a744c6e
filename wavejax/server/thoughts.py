"""Thoughts apart from the answer: text between <think> and </think>, as it comes."""

from typing import Literal

BEGIN, END = "<think>", "</think>"
Kind = Literal["thought", "text"]


def has_thoughts(template: str | None) -> bool:
    """Whether a chat template is of a model that thinks before it answers."""
    return template is not None and END in template


def held_back(text: str, mark: str) -> int:
    """Count the last characters of a text that the mark may begin with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


class ThoughtSplitter:
    """Tells an answer's thoughts from its text; the marks belong to neither, nor white space there.

    Thoughts come first or not at all: a mark within the text is text.

    Args:
        begun: whether the prompt ends with the mark that begins the thoughts.
    """

    def __init__(self, begun: bool):
        self._where: Literal["begin", "thought", "after", "text"] = "thought" if begun else "begin"
        self._held = ""
        self._said = False

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Take in more of the answer; return what is known of it now."""
        self._held += text
        found: list[tuple[Kind, str]] = []
        if self._where == "begin":
            self._begin()
        if self._where == "thought":
            found += self._thought()
        if self._where == "after":
            self._held = self._held.lstrip()
            self._where = "text" if self._held else "after"
        if self._where == "text" and self._held:
            found.append(("text", self._held))
            self._held = ""
        return found

    def end(self) -> list[tuple[Kind, str]]:
        """Return what was held back when the answer ends."""
        held, self._held = self._held, ""
        if self._where == "thought":
            held = held.rstrip() if self._said else held.strip()
        kind: Kind = "thought" if self._where == "thought" else "text"
        return [(kind, held)] if held and self._where != "after" else []

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._where, self._held = "thought", start[len(BEGIN) :]
        elif not BEGIN.startswith(start):
            self._where = "text"

    def _thought(self) -> list[tuple[Kind, str]]:
        thought, mark, rest = self._held.partition(END)
        if mark:
            self._where, self._held = "after", rest
        else:
            keep = held_back(thought, END)
            whole, tail = thought[: len(thought) - keep], thought[len(thought) - keep :]
            thought = whole.rstrip()
            self._held = whole[len(thought) :] + tail  # white space may turn out to be the last
        if not self._said:
            thought = thought.lstrip()
        if mark:
            thought = thought.rstrip()
        self._said = self._said or bool(thought)
        return [("thought", thought)] if thought else []
