"""The tools of a request: what the template is given, and which calls may or must come."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.text.tokenizer import Tokenizer
from wavejax.server.errors import ApiError
from wavejax.server.schemas import ChatBody
from wavejax.server.tool_calls import PARSERS, CallParser, Family, family_of


@dataclasses.dataclass(frozen=True)
class Toolset:
    """Functions that the model may call.

    Attributes:
        family: how it writes calls.
        tools: as the template is given them.
        parameters: of each function that may be called, the JSON schema of its arguments.
        forced: whether the answer must be a call.
    """

    family: Family
    tools: list[dict[str, Any]]
    parameters: dict[str, dict[str, Any]]
    forced: bool

    def parser(self) -> CallParser:
        """Make what finds calls in an answer."""
        return PARSERS[self.family](self.parameters.keys())


def toolset_of(body: ChatBody, tokenizer: Tokenizer) -> Toolset | None:
    """Return the tools of a request; None where it has none, or wants none called.

    Raises:
        ApiError: the model has no tools, or calls are asked for that there cannot be.
    """
    choice, tools = body.tool_choice, body.tools or []
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _refusal("`tool_choice` asks for a call, and there are no `tools`", "tool_choice")
        return None
    family = family_of(tokenizer.chat_template)
    if family is None:
        message = (
            "`tools` are not supported for this model: its chat template writes no calls as Qwen's "
            "or Llama 3.1's does; leave them out"
        )
        raise _refusal(message, "tools")
    if choice == "none":
        return None
    schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}
    if len(schemas) < len(tools):
        raise _refusal("two of the `tools` have the same name: give each its own", "tools")
    if choice is not None and not isinstance(choice, str):
        name = choice.function.name
        if name not in schemas:
            raise _refusal(f"`tool_choice` names {name!r}, which `tools` has not", "tool_choice")
        schemas = {name: schemas[name]}
    given = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]
    return Toolset(family, given, schemas, choice not in (None, "auto"))


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Give a conversation's calls the form that templates know: arguments are an object.

    Raises:
        ApiError: a call is none.
    """
    return [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _call(call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if not isinstance(arguments, dict) or not isinstance(function["name"], str):
            raise TypeError
    except (TypeError, KeyError, ValueError, RecursionError):
        message = (
            "a message's `tool_calls` has one that is no call: give {type, id, function: {name, "
            "arguments}}, the arguments a JSON object as text"
        )
        raise _refusal(message, "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _refusal(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")
