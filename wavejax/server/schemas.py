"""Bodies of requests: which fields there are, and which of OpenAI's are refused."""

from typing import Annotated, Any, Literal

import pydantic

from wavejax.server.errors import ApiError

# Fields that say something to OpenAI's own service, and change no answer.
_WITHOUT_EFFECT = {
    *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user"),
}
# Of fields that are refused, the values that ask for nothing.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "include": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "truncation": ("disabled",),
    "background": (False,),
}

TokenIds = list[pydantic.NonNegativeInt]
Positive = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
DocumentName = Annotated[str, pydantic.Field(min_length=1, max_length=255)]
Number = Annotated[float, pydantic.Field(strict=True)]
Tolerance = Annotated[float, pydantic.Field(strict=True, ge=0, le=1)]
Whole = Annotated[int, pydantic.Field(strict=True)]
Flag = Annotated[bool, pydantic.Field(strict=True)]


class Body(pydantic.BaseModel):
    """A request's body. A field that is not there and asks for something is refused."""

    model_config = pydantic.ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_characters(cls, given: Any) -> Any:
        _check_characters(given)
        return given

    def refuse_others(self) -> None:
        """Raise ApiError: a field is given that would be ignored."""
        for name, value in (self.model_extra or {}).items():
            empty = value is None or value == [] or value == {}
            if empty or name in _WITHOUT_EFFECT or value in _ASKS_NOTHING.get(name, ()):
                continue
            message = f"`{name}` is not supported here: leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")


def _check_characters(value: Any) -> None:
    """Raise ValueError for a half of a surrogate pair, which JSON can escape and UTF-8 has not."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ord(value[error.start])
                raise ValueError(
                    f"a text has U+{half:04X}, half of a surrogate pair: send whole characters"
                ) from None
        case dict():
            for name, part in value.items():
                _check_characters(name)
                _check_characters(part)
        case list() if value and not isinstance(value[0], int):  # token ids are many
            for part in value:
                _check_characters(part)


class StreamOptions(pydantic.BaseModel):
    """What a stream has besides text.

    Attributes:
        include_usage: one more chunk at the end, with `usage` and no choices.
        include_progress: wavejax's own: chunks with `progress`, and no choices, while the prompt
            is read.
        include_obfuscation: without effect.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    include_usage: bool = False
    include_progress: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What completions and chat have in common: how tokens are drawn, and when they end.

    Attributes:
        top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos: as vLLM has them.
        seed: None draws one.
        document: wavejax's own: a kept document, which the prompt begins with.
        tolerance: wavejax's own: of attention's relative error, in place of the server's; 0: none.
    """

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[Whole, pydantic.Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: Whole | None = None
    n: Annotated[Whole, pydantic.Field(ge=1, le=128)] = 1
    # The engine looks for each of them after each token.
    stop: str | Annotated[list[str], pydantic.Field(max_length=64)] | None = None
    stop_token_ids: Annotated[TokenIds, pydantic.Field(max_length=1024)] | None = None
    ignore_eos: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    document: DocumentName | None = None
    tolerance: Tolerance | None = None
    logit_bias: dict[str, float] | None = None

    def refuse_others(self) -> None:
        """Raise ApiError: a field is given that would be ignored."""
        super().refuse_others()
        if self.logit_bias:
            message = "`logit_bias` is not supported here: leave it out"
            raise ApiError(400, message, param="logit_bias", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            message = "`stream_options` is for streams: set `stream`, or leave it out"
            raise ApiError(400, message, param="stream_options")


class Format(pydantic.BaseModel):
    """`response_format`: the form that the answer is to have."""

    model_config = pydantic.ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Function(pydantic.BaseModel):
    """A function that the model may call.

    Attributes:
        parameters: the JSON schema of its arguments; None: it has none.
        strict: without effect where a call may come; where one must, it follows the schema anyway.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(pydantic.BaseModel):
    """One of `tools`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class NamedFunction(pydantic.BaseModel):
    """The function of a `tool_choice` that names one."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str


class NamedChoice(pydantic.BaseModel):
    """A `tool_choice` that names a function."""

    model_config = pydantic.ConfigDict(extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampling):
    """Of `/v1/chat/completions`.

    Attributes:
        messages: `{"role": ..., "content": text or text parts}`, oldest first.
        max_tokens: the older name of `max_completion_tokens`.
        chat_template_kwargs: as vLLM has it: variables of the chat template.
        tools: functions that the model may call.
        tool_choice: whether a call may come, "auto"; must, "required"; which; or none.
    """

    messages: list[dict[str, Any]]
    tools: Annotated[list[Tool], pydantic.Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, pydantic.Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampling):
    """Of `/v1/completions`.

    Attributes:
        prompt: a text, token ids, or a list of either.
        max_tokens: 16 if nothing is said, as OpenAI has it.
        logprobs: how many of the most probable tokens to tell of.
        echo: whether the text begins with the prompt.
    """

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Positive | None = 16
    logprobs: Annotated[Whole, pydantic.Field(ge=0, le=20)] | None = None
    echo: Flag = False


class TokenizeBody(Body):
    """Of `/tokenize`, as vLLM has it.

    Attributes:
        prompt: a text that is continued; or else
        messages: a conversation.
        add_special_tokens: whether a text begins with the model's beginning-of-text token.
        return_token_strs: whether to tell each token's text.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: Flag = True
    return_token_strs: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None


class TextOptions(pydantic.BaseModel):
    """`text` of `/v1/responses`: the form that the answer is to have."""

    model_config = pydantic.ConfigDict(extra="forbid")

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(Body):
    """Of `/v1/responses`: text in, text out.

    Attributes:
        input: a text, or messages.
        instructions: a system message before them.
        max_output_tokens: most tokens of the answer.
        document, tolerance: as of `Sampling`.
    """

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    text: TextOptions | None = None
    stream: Flag = False
    document: DocumentName | None = None
    tolerance: Tolerance | None = None
    metadata: dict[str, str] | None = None
