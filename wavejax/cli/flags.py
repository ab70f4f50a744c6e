"""The library's errors as a user of the command line reads them: flags in place of parameters."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import fields

from models.errors import InputError
from wavejax.config import WaveConfig
from wavejax.engine.sampling import Sampler

# The parameters that the library names in backticks, as in `max_context=600`.
_FLAGS = {
    name: "--" + name.replace("_", "-")
    for name in (
        *(field.name for settings in (WaveConfig, Sampler) for field in fields(settings)),
        "max_new_tokens", "max_context", "rope_scaling", "samples", "system", "raw", "messages",
        "store", "fetch", "attention", "dtype", "weight_dtype",
        "new_tokens", "context", "haystack", "out", "plots",
        "host", "port", "slots", "queue_limit", "max_stall_ms",
    )
} | {
    "template_args": "--template-arg", "sampler": "--sampling", "path": "--model",
}  # fmt: skip
_PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


def in_flags(message: str) -> str:
    """Name flags in a message of the library.

    "`max_context=600`" becomes "--max-context 600", "`raw=True`" "--raw" and "`plots=False`"
    "--no-plots".
    """
    return _PARAMETER.sub(_flag, message)


@contextlib.contextmanager
def errors_in_flags() -> Iterator[None]:
    """Make an InputError that is raised in here name flags; `main_guard` does so for a command."""
    try:
        yield
    except InputError as error:
        raise InputError(in_flags(str(error))) from error


def _flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    if name not in _FLAGS:
        return found[0]
    flag = _FLAGS[name]
    if value == "False":
        return f"--no-{flag[2:]}"
    return flag if value in (None, "True") else f"{flag} {value.strip(chr(39))}"
