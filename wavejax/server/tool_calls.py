"""Tool calls as model families write them: found in an answer's text as it comes."""

import abc
import dataclasses
import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any, Literal

from wavejax.server.thoughts import held_back

Family = Literal["hermes", "llama"]
_BEGIN, _END = "<tool_call>", "</tool_call>"
# Of Llama 3.1's template and its successors'.
_LLAMA = '{"name": function name, "parameters":'
# A call between the same marks, but not as JSON: Qwen3-Coder's.
_NOT_JSON = "<function="


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that the model asks for.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
        id: by which the answer to it says what it answers.
    """

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{uuid.uuid4().hex}")


def family_of(template: str | None) -> Family | None:
    """Tell how a model writes calls, by its chat template; None where that is not known."""
    if template is None or _NOT_JSON in template:
        return None
    if _BEGIN in template:
        return "hermes"
    return "llama" if _LLAMA in template else None


def call_of(value: Any, names: Collection[str]) -> Call | None:
    """Read a call from what a model wrote as JSON; None where it is none of these functions'."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


class CallParser(abc.ABC):
    """Finds calls in an answer's text. What is no call is text, marks included.

    Args:
        names: of the functions that there are.
    """

    def __init__(self, names: Collection[str]):
        self._names = names
        self._held = ""

    @abc.abstractmethod
    def push(self, text: str) -> list[str | Call]:
        """Take in more of the answer; return what is known of it now."""

    @abc.abstractmethod
    def end(self) -> list[str | Call]:
        """Return what was held back when the answer ends."""


class HermesParser(CallParser):
    """Calls between <tool_call> and </tool_call>, as Qwen's and Hermes models write them."""

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._after_call = False

    def push(self, text: str) -> list[str | Call]:
        """See `CallParser`."""
        self._held += text
        found: list[str | Call] = []
        while True:
            before, begin, rest = self._held.partition(_BEGIN)
            if not begin:
                keep = held_back(before, _BEGIN)
                # White space before a call is no part of the answer.
                whole = before[: len(before) - keep].rstrip()
                found += self._text(whole)
                self._held = before[len(whole) :]
                return found
            found += self._text(before.rstrip())
            inside, end, after = rest.partition(_END)
            if not end:
                self._held = begin + rest
                return found
            call = call_of(_json(inside), self._names)
            found += self._text(begin + inside + end) if call is None else [call]
            self._held, self._after_call = after, call is not None

    def end(self) -> list[str | Call]:
        """See `CallParser`. The last call's end mark may be missing: some models stop before it."""
        held, self._held = self._held, ""
        _, begin, inside = held.partition(_BEGIN)
        call = call_of(_json(inside), self._names) if begin else None
        return self._text(held) if call is None else [call]

    def _text(self, text: str) -> list[str | Call]:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return [text] if text else []


class LlamaParser(CallParser):
    """Answers that are nothing but calls as JSON, as Llama 3.1 and its successors write them."""

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._is_text = False

    def push(self, text: str) -> list[str | Call]:
        """See `CallParser`. What begins as JSON is held back: only its end says what it is."""
        self._held += text
        if not self._is_text and self._held.lstrip()[:1] in ("", "{"):
            return []
        self._is_text, held, self._held = True, self._held, ""
        return [held] if held else []

    def end(self) -> list[str | Call]:
        """See `CallParser`."""
        held, self._held = self._held, ""
        calls = [call_of(value, self._names) for value in _objects(held)]
        if calls and None not in calls:
            return [call for call in calls if call is not None]
        return [held] if held else []


PARSERS: dict[Family, type[CallParser]] = {"hermes": HermesParser, "llama": LlamaParser}


def _objects(text: str) -> Iterator[Any]:
    """Read JSON values between semicolons; None where there is something else."""
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            yield None
            return
        yield value
        text = text[end:].lstrip("; \t\r\n")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
