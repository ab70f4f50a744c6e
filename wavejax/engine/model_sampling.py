"""Sampling as the model's own generation_config.json has it; samples that would be the same."""

import json
import math
from pathlib import Path
from typing import Any

from models.errors import InputError
from wavejax.engine.sampling import Sampler

FILE = "generation_config.json"
# What of it is a field of `Sampler`, by the same name.
_FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def model_sampling(model: Path) -> dict[str, Any]:
    """Return the sampler's fields that the model states, `{"temperature": 0.6, ...}`.

    Sampling without a temperature is at 1. Not to sample, which `do_sample: false` or no value but
    a penalty says, is temperature 0.

    Args:
        model: the model's folder; a file, as a GGUF model is, has no such values.

    Raises:
        InputError: there are none, or one cannot be used.
    """
    file = model / FILE
    if not file.is_file():
        raise InputError(
            f"`sampler='model'`: {model} has no {FILE}; give `temperature`, `top_p` and `top_k` "
            "with what its authors advise"
        )
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(stated, dict):
        raise InputError(f"{file} holds a JSON {type(stated).__name__}, expected an object")
    values = {
        name: _number(file, name, stated[name], kind)
        for name, kind in _FIELDS.items()
        if stated.get(name) is not None
    }
    sampled = stated.get("do_sample")
    if not values and sampled is not True:
        raise InputError(
            f"`sampler='model'`: {file} states no {', '.join(_FIELDS)}; give `temperature`"
        )
    penalty = {name: values.pop(name) for name in ("repetition_penalty",) if name in values}
    if sampled is None:
        sampled = bool(values)
    return ({"temperature": 1.0} | values if sampled else {"temperature": 0.0}) | penalty


def _number(file: Path, name: str, value: Any, kind: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or kind(value) != value:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{file}: {name} is {json.dumps(value)}; expected {wanted}")
    return kind(value)


def check_samples(samples: int, sampler: Sampler) -> None:
    """Raise InputError where several samples would all be the same answer."""
    if samples > 1 and sampler.greedy:
        raise InputError(
            f"`samples={samples}` without sampling would be {samples} times the same answer: give "
            "a `temperature` above 0, or `sampler='model'`"
        )
