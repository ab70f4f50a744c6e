"""Reads the text and JSON files that stand beside a model's weights."""

import json
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.paths import refuse_stand_in


def read_text(file: Path) -> str | None:
    """Return what a text file holds; None if there is no such file; raise InputError."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {one_line(error)}") from None
    refuse_stand_in(file)
    return text


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is no such file; raise InputError."""
    text = read_text(file)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        # Half of a surrogate pair, which JSON can spell out, is in no text: this raises.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())
