"""What callers give, as the generator takes it: numbers, prompts, stop tokens, tokens to run.

Each function returns what was given in one form, or raises an InputError of one line. They take
anything: it is for them to find out what was given.
"""

import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError

MOST_INT32 = 2**31 - 1


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Python's int, of anything that is a whole number: numpy's and JAX's too.

    Raises:
        InputError: it is no whole number, or outside its range. A fraction is not cut off, and a
            boolean is no number.
    """
    expected = f", {least} or more" if most is None else f" from {least} to {most}"
    number = _whole(value)
    if number is None or number < least or (most is not None and number > most):
        raise InputError(f"{name} is {_shown(value)}; it must be a whole number{expected}")
    return number


def real_number(name: str, value: Any) -> float:
    """Python's float, of anything that is a number; raises InputError if it is none."""
    number = None
    if not isinstance(value, str | bytes | bool | np.bool_):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
    if number is None:
        raise InputError(f"{name} is {_shown(value)}; it must be a number")
    return number


def as_prompts(prompts: Any, vocab: int) -> list[np.ndarray]:
    """Prompts as int32 arrays.

    Args:
        prompts: any iterable of iterables of token ids: lists, arrays, generators.
        vocab: how many tokens the model has.

    Raises:
        InputError: there is no prompt, one is empty or no list of whole numbers, or a token is not
            the model's.
    """
    if isinstance(prompts, str | bytes):
        raise InputError(f"prompts is a text, {_shown(prompts)}; {_NO_TEXT}")
    if not _iterates(prompts):
        raise InputError(f"prompts is {_shown(prompts)}; it must be a list of prompts, {_PROMPT}")
    listed = list(prompts)
    if not listed:
        raise InputError("there is no prompt: give at least one")
    if all(_whole(one) is not None for one in listed):
        raise InputError(
            "prompts is one list of numbers; it must be a list of prompts: give [prompt] for one"
        )
    return [_as_prompt(number, prompt, vocab) for number, prompt in enumerate(listed, 1)]


_PROMPT = "each a list of token ids"
_NO_TEXT = "token ids are wanted: encode it first, as models.text.tokenizer does"


def _as_prompt(number: int, prompt: Any, vocab: int) -> np.ndarray:
    if isinstance(prompt, str | bytes):
        raise InputError(f"prompt {number} is a text, {_shown(prompt)}; {_NO_TEXT}")
    tokens = _as_array(prompt)
    if tokens is None or tokens.ndim != 1:
        raise InputError(f"prompt {number} is {_shown(prompt)}; it must be a list of token ids")
    if tokens.size == 0:
        raise InputError(f"prompt {number} is empty: give at least one token")
    wrong = _no_whole_number(tokens)
    if wrong is not None:
        raise InputError(
            f"prompt {number} has {wrong}; tokens are whole numbers from 0 to {vocab - 1}"
        )
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab:
            raise InputError(f"prompt {number} has token {token}; the model has 0 to {vocab - 1}")
    return tokens.astype(np.int32)


def as_stop_tokens(stop_tokens: Any, vocab: int) -> tuple[int, ...]:
    """Stop tokens as a tuple: hashable, the same for the same set.

    Raises:
        InputError: one is no whole number, or not the model's.
    """
    if isinstance(stop_tokens, str | bytes) or not _iterates(stop_tokens):
        raise InputError(
            f"stop_tokens is {_shown(stop_tokens)}; it must be a list of token ids, empty for none"
        )
    most = vocab - 1
    found = {whole_number("a stop token", token, 0, most) for token in stop_tokens}
    return tuple(sorted(found))


def as_sequences(sequences: Any, batch: int) -> np.ndarray:
    """Return the numbers by which the noise of sequences is keyed, int32: 0, 1, 2, ... for None.

    Raises:
        InputError: there are more or fewer than prompts, or one is no whole number of an int32.
    """
    if sequences is None:
        return np.arange(batch, dtype=np.int32)
    if isinstance(sequences, str | bytes) or not _iterates(sequences):
        raise InputError(
            f"sequences is {_shown(sequences)}; it must be a list of whole numbers, one a prompt"
        )
    found = [whole_number("a sequence's number", one, 0, MOST_INT32) for one in sequences]
    if len(found) != batch:
        raise InputError(f"sequences has {len(found)} numbers for {batch} prompts; give one each")
    return np.asarray(found, np.int32)


def as_tokens(tokens: Any, steps: bool, batch: int, vocab: int) -> jax.Array:
    """Tokens to run through the model, int32.

    Args:
        tokens: whole numbers, `[steps, batch]` or `[batch]`; of a sequence that is finished,
            NO_TOKEN too. Those on the device are not waited for, and their range is not looked at.
        steps: whether they are of several steps.
        batch: sequences.
        vocab: how many tokens the model has.

    Raises:
        InputError: they are no whole numbers, not the model's, or of another shape.
    """
    on_device = isinstance(tokens, jax.Array)
    given = tokens if on_device else _as_array(tokens)
    if given is None or (given.size and given.dtype.kind not in "iu"):
        wrong = "these" if given is None or on_device else _no_whole_number(given) or "these"
        raise InputError(f"the tokens to run are {wrong}; they must be whole numbers")
    if given.ndim != 1 + steps or given.shape[-1] != batch:
        raise InputError(
            f"the tokens to run have the shape {list(given.shape)}; it must be "
            f"[{'steps, ' if steps else ''}batch], of {batch} sequences"
        )
    if not on_device and given.size:
        check_range(given, vocab, least=-1)
    return jnp.asarray(given, jnp.int32)


def check_range(tokens: np.ndarray, vocab: int, least: int = 0) -> None:
    """Raise InputError: one of the tokens to run is not the model's."""
    for token in (int(tokens.min(initial=0)), int(tokens.max(initial=0))):
        if not least <= token < vocab:
            raise InputError(f"token {token} is to be run; the model has 0 to {vocab - 1}")


def _as_array(values: Any) -> np.ndarray | None:
    """Return an array of what was given; None where it is nothing to make one of."""
    if not _iterates(values):
        return None
    try:
        return np.asarray(values if hasattr(values, "dtype") else list(values))
    except ValueError:  # lists of several lengths
        return None


def _no_whole_number(values: np.ndarray) -> str | None:
    """Return the first of the values that is no whole number, or too large a one, to be named."""
    if values.dtype.kind in "iu":
        return None
    flat = values.reshape(-1).tolist()
    found = [value for value in flat if _whole(value) is None]
    return _shown(found[0] if found else max(flat, key=abs))


def _whole(value: Any) -> int | None:
    """Return the whole number that a value is, if it is one."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
        return None
    try:
        return operator.index(value)
    except TypeError:  # of anything else, traced numbers too
        return None


def _iterates(value: Any) -> bool:
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _shown(value: Any) -> str:
    """Return a value as a message names it: short, on one line."""
    if isinstance(value, np.generic):
        value = value.item()
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
