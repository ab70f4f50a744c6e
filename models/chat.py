"""Chat templates: a conversation as the one text that a model was trained to continue."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
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


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a model must see them as they are.
    return json.dumps(value, ensure_ascii=False, indent=indent)


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


def apply_chat(
    template: str,
    messages: Sequence[dict[str, str]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, special tokens written out.

    messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
    add_generation_prompt: end with what opens the model's answer.
    Raises InputError if the template is broken or refuses the messages.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=list(messages),
                tools=None,
                documents=None,
                bos_token=bos_token or "",
                eos_token=eos_token or "",
                add_generation_prompt=add_generation_prompt,
            )
        )
    except _TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the model's chat template failed ({reason}): pass the prompt as it is (--raw)"
        ) from error
