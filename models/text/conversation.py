"""A conversation as a chat template writes it: nothing dropped, users' text told from control.

A template acts on the messages as they are: it trims, tests and splits them. So they are rendered
as they are, and once more with single characters replaced by others that no text holds. Where both
renderings are the same but for these, they show where the messages lie.
"""

import itertools
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import InputError
from models.text.control_tokens import ControlTokens

Messages = list[dict[str, Any]]
# Characters of private use, which have no meaning that a template could look for.
_STAND_INS = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))
# What templates look for in messages, as Qwen3's for </think> and SmolLM3's for /no_think.
_QUOTED = re.compile(r"""(["'])([/<\[][^"'\s]+)\1""")
_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Rendering:
    """A conversation's text.

    Attributes:
        text: with stand-ins where the messages spell control tokens.
        stand_ins: what they stand for, by code point, as `str.translate` has them.
    """

    text: str
    stand_ins: dict[int, str]

    @property
    def plain(self) -> str:
        """The text as the template writes it."""
        return self.text.translate(self.stand_ins)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return the messages, the text parts of each joined to one text; raise InputError."""
    read = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{where} is {reprlib.repr(message)}; expected "
                '{"role": "system" | "user" | "assistant", "content": text}'
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = None if None in parts else "".join(map(str, parts))
            if content is None:
                raise InputError(f"{where} has a part that is no text; only texts can be read")
        if content is not None and not isinstance(content, str):
            raise InputError(f"{where}: its content is {reprlib.repr(content)}; expected a text")
        read.append({**message, "content": content})
    return read


def refuse_spelt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], control: ControlTokens
) -> None:
    """Raise InputError where tools, or calls of them, spell control tokens.

    They are written within JSON, where stand-ins would not do.
    """
    given = [("the tools", text, False) for text in _texts(list(tools))]
    for message in messages:
        if isinstance(message, Mapping):
            more = [
                x for name, x in message.items() if name != "content" and not isinstance(x, str)
            ]
            given += [("a message's tool calls", text, True) for text in _texts(more)]
    for where, text, answer in given:
        if control.starts(text, answer=answer):
            raise InputError(f"{where} spell a control token of the model: leave it out")


def _texts(value: Any) -> Iterator[str]:
    """List the texts in a plain value, names of fields too."""
    match value:
        case str():
            yield value
        case Mapping():
            for name, part in value.items():
                yield from _texts(name)
                yield from _texts(part)
        case list() | tuple():
            for part in value:
                yield from _texts(part)


def render_conversation(
    render: Callable[[Messages], str],
    messages: Sequence[Mapping[str, Any]],
    control: ControlTokens,
    template: str,
) -> Rendering:
    """Render a conversation by `render`, and mark what its messages spell of control tokens.

    Messages that the template drops are given to it once more as typed parts, which templates of
    models for images go through.

    Raises:
        InputError: the messages are none, `render` raises it, or a message is dropped either way.
    """
    read = read_messages(messages)
    first_error: InputError | None = None
    for typed_roles in (_no_role, _any_role, _no_system):
        try:
            return _Attempt(render, read, typed_roles, control, template).rendering()
        except InputError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _no_role(role: str) -> bool:
    return False


def _any_role(role: str) -> bool:
    return True


def _no_system(role: str) -> bool:
    return role != "system"


class _Attempt:
    """One way to give the messages to a template: as texts, or some of them as typed parts."""

    def __init__(
        self,
        render: Callable[[Messages], str],
        messages: Messages,
        typed: Callable[[str], bool],
        control: ControlTokens,
        template: str,
    ):
        self.render, self.messages, self.typed = render, messages, typed
        self.control, self.template = control, template
        self.texts = [message["content"] or "" for message in messages]
        # Other texts of a message, such as an answer's thoughts, are the model's own.
        self._fields = [
            {
                name: control.starts(value, answer=True)
                for name, value in message.items()
                if name not in ("role", "content") and isinstance(value, str)
            }
            for message in messages
        ]
        self.stand_ins: dict[int, str] = {}
        self._stand_in_of: dict[str, str] = {}
        self._free = self._unused_characters()

    def rendering(self) -> Rendering:
        starts = [
            self.control.starts(text, answer=message["role"] == "assistant")
            for message, text in zip(self.messages, self.texts, strict=True)
        ]
        plain = self.render(self._given([()] * len(self.texts), (), mark_fields=False))
        # Every message's first and last letter too: then it is known where each of them is.
        edges = [self._edges(text) for text in self.texts]
        exact = self._try(starts, edges)
        if exact is not None and exact.translate(self.stand_ins) == plain:
            self._check_edges(exact, edges)
        # Else it looks at what the messages begin or end with, or at control tokens in them: the
        # former it is to find, the latter are text.
        spelt = any(starts) or any(any(fields.values()) for fields in self._fields)
        masked = self._rendered(starts) if spelt else plain
        text = masked.translate(self.stand_ins)
        self._check_no_parts_written(text)
        for number, content in enumerate(self.texts):
            if not self._holds(text, content, self.messages[number]["role"]):
                raise self._dropped(number)
        return Rendering(masked, self.stand_ins if spelt else {})

    def _try(
        self, places: Sequence[Iterable[int]], edges: Sequence[dict[int, str]] = ()
    ) -> str | None:
        try:
            return self._rendered(places, edges)
        except InputError:  # what the template looks for is not there now
            return None

    def _rendered(
        self, places: Sequence[Iterable[int]], edges: Sequence[dict[int, str]] = ()
    ) -> str:
        """Return the template's text, with stand-ins at these places of the messages."""
        return self.render(self._given(places, edges, mark_fields=True))

    def _given(
        self,
        places: Sequence[Iterable[int]],
        edges: Sequence[dict[int, str]],
        *,
        mark_fields: bool,
    ) -> Messages:
        given: Messages = []
        for number, (message, text) in enumerate(zip(self.messages, self.texts, strict=True)):
            marks = {place: self._stand_in(text[place]) for place in places[number]}
            marks |= edges[number] if edges else {}
            content: Any = None
            if message["content"] is not None:
                content = _with_marks(text, marks)
                if self.typed(message["role"]):
                    content = [{"type": "text", "text": content}]
            fields = {
                name: _with_marks(message[name], {i: self._stand_in(message[name][i]) for i in at})
                for name, at in self._fields[number].items()
                if mark_fields
            }
            given.append({**message, **fields, "content": content})
        return given

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_in_of:
            self._stand_in_of[char] = self._new_stand_in(char)
        return self._stand_in_of[char]

    def _new_stand_in(self, char: str) -> str:
        mark = next(self._free, None)
        if mark is None:
            raise InputError(f"{len(self.messages)} messages are too many to tell apart")
        self.stand_ins[ord(mark)] = char
        return mark

    def _edges(self, text: str) -> dict[int, str]:
        """Stand-ins of their own for the first and the last character that is no white space."""
        start, end = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
        return {place: self._new_stand_in(text[place]) for place in (start, end) if start <= end}

    def _unused_characters(self) -> Iterator[str]:
        used = set().union(self.template, *map(str, self.messages), *self.texts)
        return (char for char in map(chr, itertools.chain(*_STAND_INS)) if char not in used)

    def _check_edges(self, rendered: str, edges: Sequence[dict[int, str]]) -> None:
        """Raise InputError unless each message's last letter was written, and its first.

        Of an answer the beginning may be left out: its thoughts.
        """
        for number, marks in enumerate(edges):
            answer = self.messages[number]["role"] == "assistant"
            wanted = list(marks.values())[-1:] if answer else marks.values()
            if not all(mark in rendered for mark in wanted):
                raise self._dropped(number)

    def _check_no_parts_written(self, text: str) -> None:
        """Raise InputError where the template wrote typed parts out, as Python or JSON would."""
        for mark in ("'type': 'text'", '"type": "text"'):
            own = sum(content.count(mark) for content in [self.template, *self.texts])
            if text.count(mark) > own:
                raise self._dropped(0)

    def _holds(self, text: str, content: str, role: str) -> bool:
        """Whether the text holds the message, but for white space and what was looked for there."""
        if role == "assistant":
            content = content.rpartition(_END_OF_THOUGHT)[2]
        if content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
            return True
        squeezed, end = "".join(text.split()), 0
        quoted = sorted({found[2] for found in _QUOTED.finditer(self.template)}, reverse=True)
        pieces = re.split("|".join(map(re.escape, quoted)), content) if quoted else [content]
        for piece in ("".join(piece.split()) for piece in pieces):
            found = squeezed.find(piece, end)
            if found < 0:
                return False
            end = found + len(piece)
        return True

    def _dropped(self, number: int) -> InputError:
        role = self.messages[number]["role"]
        instead = "give its text in the user's message, or " if role == "system" else ""
        return InputError(
            f"the model's chat template leaves out message {number + 1} of {len(self.messages)} "
            f"({role}), or changes its text: {instead}pass the prompt as it is (`raw=True`)"
        )


def _with_marks(text: str, marks: Mapping[int, str]) -> str:
    """Return the text with other characters at some places."""
    pieces, end = [], 0
    for place in sorted(marks):
        pieces += [text[end:place], marks[place]]
        end = place + 1
    return "".join([*pieces, text[end:]])
