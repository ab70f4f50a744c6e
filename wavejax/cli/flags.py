"""The library's errors as a user of the command line reads them: flags in place of parameters."""

import contextlib
import re
from collections.abc import Iterator

from models.errors import InputError

# The parameters that the library names in backticks, as in `max_context=600`.
_FLAGS = {
    name: "--" + name.replace("_", "-")
    for name in (
        "max_new_tokens", "max_context", "rope_scaling", "samples", "system", "raw", "messages",
        "store", "fetch", "attention", "temperature", "top_p", "top_k",
    )
} | {"template_args": "--template-arg", "sampler": "--sampling"}  # fmt: skip
_PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


@contextlib.contextmanager
def errors_in_flags() -> Iterator[None]:
    """An InputError raised in here names flags: "`max_context=600`" is "--max-context 600"."""
    try:
        yield
    except InputError as error:
        raise InputError(_PARAMETER.sub(_flag, str(error))) from error


def _flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    if name not in _FLAGS:
        return found[0]
    return _FLAGS[name] if value is None else f"{_FLAGS[name]} {value.strip(chr(39))}"
