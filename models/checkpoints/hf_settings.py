"""Settings that the ways of quantising share, in a config.json's quantization_config."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.errors import InputError
from models.values import is_number


def setting(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value at `key`, else the default, also where the value is null."""
    value = settings.get(key)
    return default if value is None else value


def block_size(value: Any, key: str) -> tuple[int, int]:
    """Return rows and columns of a block; InputError for what is no such pair."""
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(is_number(size) and size >= 1 and size == int(size) for size in value)
    ):
        raise InputError(
            f"config.json: quantization_config's {key} is {reprlib.repr(value)}; expected two "
            "whole numbers from 1 on"
        )
    return int(value[0]), int(value[1])


def bits_of(settings: Mapping[str, Any], name: str, known: tuple[int, ...]) -> int:
    """Return the bits of a number; InputError unless they are known."""
    bits = settings.get("bits", settings.get("w_bit"))
    if isinstance(bits, bool) or bits not in known:
        raise InputError(not_read(f"is {name} of {bits!r} bits", " and ".join(map(str, known))))
    return int(bits)


def group_size(settings: Mapping[str, Any]) -> int | None:
    """Return the columns of a group, None for all; InputError for what is neither."""
    size = settings.get("group_size", settings.get("q_group_size"))
    size = 128 if size is None else size
    if size == -1:
        return None
    if type(size) is not int or size < 1:
        raise InputError(
            f"config.json: quantization_config's group_size is {size!r}; expected a whole number "
            "from 1 on, or -1 for all columns"
        )
    return size


def not_read(what: str, known: str) -> str:
    """Return what is said of settings that are not read, and of those that are."""
    return (
        f"config.json: quantization_config {what}, which is not read; read are {known}: take "
        "another one, the model that was quantised, or a GGUF file of it"
    )
