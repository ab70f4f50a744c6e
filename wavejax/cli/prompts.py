"""Prompts and conversations as the command line gives them."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError

Message = dict[str, str]  # {"role": ..., "content": ...}
ROLES = ("system", "user", "assistant")


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the prompts of the command line, then those in files (`-` is the standard input).

    Raises InputError for a file that cannot be read, bytes that are not UTF-8, an empty prompt, or
    none at all.
    """
    named = [(f"prompt {i}", os.fsencode(text)) for i, text in enumerate(texts, 1)]
    named += [_read("prompt file", file) for file in _one_stdin("prompt files", files)]
    if not named:
        raise InputError(
            "no prompt: give --prompt TEXT, --prompt-file FILE, or --messages FILE for a "
            "conversation"
        )
    return [_decode(name, content) for name, content in named]


def read_conversations(files: Sequence[str]) -> list[list[Message]]:
    """Conversations, each a JSON file of `[{"role": ..., "content": ...}, ...]`, oldest first.

    Raises InputError for a file that cannot be read, is no JSON, or holds anything else.
    """
    return [
        _conversation(*_read("message file", file)) for file in _one_stdin("message files", files)
    ]


def parse_template_args(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` each; a value that is JSON as what it stands for. Raises InputError."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(
                f"--template-arg is {pair!r}; give KEY=VALUE, such as enable_thinking=false"
            )
        if key in values:
            raise InputError(f"--template-arg {key} is given twice: give it once")
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):
            values[key] = value
    return values


def _one_stdin(what: str, files: Sequence[str]) -> Sequence[str]:
    if files.count("-") > 1:
        raise InputError(f"the standard input, -, can be only one of the {what}")
    return files


def _read(what: str, file: str) -> tuple[str, bytes]:
    """Return the name to call a file by, and its content; raise InputError."""
    if file == "-" and sys.stdin is None:
        raise InputError("the standard input, -, is closed: pipe the text in, or name a file")
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {what} {file}: {reason}") from error
    return ("the standard input" if file == "-" else file), content


def _decode(name: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start} "
            "begins no character; convert it to UTF-8 first"
        ) from error
    text = text.removeprefix("\ufeff")  # the mark that some editors put first
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text


def _conversation(name: str, content: bytes) -> list[Message]:
    expected = 'a JSON list of {"role": "system", "user" or "assistant", "content": text}'
    try:
        messages = json.loads(_decode(name, content))
        # Half of a surrogate pair, which JSON can spell out, is in no text: this raises.
        json.dumps(messages, ensure_ascii=False).encode("utf-8")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}); expected {expected}") from error
    if not isinstance(messages, list) or not messages:
        given = "an empty list" if messages == [] else f"a JSON {type(messages).__name__}"
        raise InputError(f"{name} holds {given}; expected {expected}")
    for number, message in enumerate(messages, 1):
        problem = _problem(message)
        if problem is not None:
            raise InputError(f"{name}: message {number} {problem}; expected {expected}")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"{name} ends with a message of role {messages[-1]['role']}; the model answers a "
            "user's: end with one"
        )
    if not messages[-1]["content"].strip():
        raise InputError(f"{name}: the last message is empty")
    return messages


def _problem(message: Any) -> str | None:
    """Return what is wrong with the shape of a message, as the end of a sentence.

    None if nothing is.
    """
    if not isinstance(message, dict):
        return f"is a JSON {type(message).__name__}"
    for key in ("role", "content"):
        if key not in message:
            return f"has no {key}"
        if not isinstance(message[key], str):
            return f"has a {key} that is a JSON {type(message[key]).__name__}"
    others = sorted(set(message) - {"role", "content"})
    if others:
        return f"has {others[0]!r} besides role and content"
    if message["role"] not in ROLES:
        return f"has the role {message['role']!r}"
    return None
