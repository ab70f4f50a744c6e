"""What the values in a model's files must be."""

import reprlib
import sys
from typing import Any

from models.errors import InputError

# Token ids and positions are int32.
INT32_LIMIT = 2**31


def is_number(value: Any) -> bool:
    """Whether `value` is a number that a float holds: no NaN, infinity or longer integer."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def token_id(value: Any, where: str) -> int:
    """`value` if it is a token id; InputError that begins with `where` if it is not."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < INT32_LIMIT:
        raise InputError(
            f"{where} is {reprlib.repr(value)}; expected a token id (a whole number from 0 to "
            f"{INT32_LIMIT - 1})"
        )
    return value


def token_ids(value: Any, where: str) -> list[int]:
    """Return the token ids that a JSON file states: none (null), one, or a list.

    Raise InputError for anything else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return [token_id(index, where) for index in ids]
