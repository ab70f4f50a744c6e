"""Numbers in a Hugging Face config.json, with errors that name their keys."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.errors import InputError
from models.values import is_number


def integer_in(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return the whole number at `key`, else `default`.

    Raise InputError for none, or what is no such number.
    """
    number = number_in(values, key, None if default is None else float(default))
    if number != int(number):
        raise InputError(f"config.json: {key} is {number}; expected a whole number")
    return int(number)


def number_in(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return the number at `key`, else `default`; InputError for none, or what is no number."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    if not is_number(value):
        raise InputError(f"config.json: {key} is {reprlib.repr(value)}; expected a number")
    return float(value)
