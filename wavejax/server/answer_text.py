"""An answer's text as a client gets it: thoughts, text and calls, each apart, as they come."""

import dataclasses
from collections.abc import Iterable

from wavejax.server.thoughts import ThoughtSplitter
from wavejax.server.tool_calls import Call, CallParser


@dataclasses.dataclass(frozen=True)
class Thought:
    """A part of the thoughts."""

    text: str


Said = Thought | str | Call


class AnswerText:
    """Tells what one answer says, from its pieces' texts.

    Args:
        splitter: tells thoughts; None: there are none.
        parser: finds calls; None: there are none.
    """

    def __init__(self, splitter: ThoughtSplitter | None, parser: CallParser | None):
        self._splitter, self._parser = splitter, parser
        self.called = 0

    def push(self, text: str, *, last: bool) -> list[Said]:
        """Take in a piece's text; return what is known now.

        Args:
            text: of the piece; may be "".
            last: whether the answer ends with it.
        """
        split = [("text", text)] if text else []
        if self._splitter is not None:
            split = [*self._splitter.push(text), *(self._splitter.end() if last else [])]
        said: list[Said] = []
        for kind, part in split:
            if kind == "thought":
                said.append(Thought(part))
            else:
                said += [part] if self._parser is None else self._parser.push(part)
        if last and self._parser is not None:
            said += self._parser.end()
        self.called += sum(isinstance(one, Call) for one in said)
        return said


def joined(said: Iterable[Said]) -> tuple[str, str, list[Call]]:
    """Return an answer's thoughts, text and calls."""
    parts = list(said)
    thoughts = "".join(one.text for one in parts if isinstance(one, Thought))
    text = "".join(one for one in parts if isinstance(one, str))
    return thoughts, text, [one for one in parts if isinstance(one, Call)]
