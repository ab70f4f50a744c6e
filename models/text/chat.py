"""Chat templates: a conversation as the one text that a model was trained to continue."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from models.errors import InputError

# A broken template may raise any of these: it does arithmetic, indexing and calls of its own, and
# is turned into Python, which calls itself only so deep (RuntimeError) and nests so far.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    SyntaxError,
)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the answers for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a model must see them as they are.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _environment() -> jinja2.Environment:
    # A template comes with the weights, from anywhere: its sandbox lets it change nothing.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """Return a template, and the variables that it reads."""
    environment = _environment()
    variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return environment.from_string(template), frozenset(variables)


def _failed(error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"the model's chat template failed ({reason}): pass the prompt as it is (`raw=True`)"
    )


def _check_arguments(
    given: Mapping[str, Any], own: Mapping[str, Any], read: frozenset[str]
) -> None:
    """Raise InputError where a variable is set already, or the template does not read it."""
    taken = own.keys() | _environment().globals.keys()
    for name in given:
        if name in taken:
            raise InputError(
                f"the template variable {name} is set by the conversation itself; leave it out"
            )
        if name not in read:
            known = ", ".join(sorted(read - taken)) or "none"
            raise InputError(f"the model's chat template has no variable {name}; it has: {known}")


def apply_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    template_args: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the text of a conversation, special tokens written out.

    messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
    add_generation_prompt: end with what opens the model's answer.
    template_args: more variables for the template, such as `{"enable_thinking": False}`.
    tools: functions that the model may call, as OpenAI's API describes them.
    Raises InputError if the template is broken, refuses the messages, or knows no tools and there
    are some; or if a variable of `template_args` is one that is set here, or one that the template
    does not read.
    """
    variables = {
        "messages": list(messages),
        "tools": list(tools) if tools else None,
        "documents": None,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        compiled, read = _compiled(template)
    except _TEMPLATE_ERRORS as error:
        raise _failed(error) from error
    if tools and "tools" not in read:
        raise InputError("the model's chat template knows no tools: leave `tools` out")
    _check_arguments(template_args or {}, variables, read)
    try:
        return compiled.render(variables | dict(template_args or {}))
    except _TEMPLATE_ERRORS as error:
        raise _failed(error) from error
