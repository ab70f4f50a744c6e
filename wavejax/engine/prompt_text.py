"""Texts and conversations as the token ids that a model reads, and whether it can take them.

Messages name parameters in backticks, `max_context=600`: commands tell them as flags.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import ModelConfig
from models.errors import InputError
from models.rope_option import suggest_rope_scaling
from models.text.tokenizer import Tokenizer

Message = Mapping[str, object]
"""`{"role": "system" | "user" | "assistant", "content": text}`"""

Prompt = str | Sequence[Message]
"""A text, or a conversation, oldest message first."""


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
        ids: its tokens.
        raw: whether its answer continues the text; else it answers a message.
    """

    ids: list[int]
    raw: bool


def list_prompts(prompts: Any) -> list[Prompt]:
    """One prompt, or a batch, as a batch. It takes anything, to find out what was given.

    Raises:
        InputError: there is none, or one is neither a text nor a list of messages.
    """
    expected = 'expected a text, a list of {"role": ..., "content": ...}, or a list of such prompts'
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
        raise InputError(f"the prompt is of type {type(prompts).__name__}; {expected}")
    if not prompts:
        raise InputError(f"there is no prompt; {expected}")
    if all(isinstance(one, Mapping) for one in prompts):
        return [prompts]
    for number, one in enumerate(prompts, 1):
        if isinstance(one, bytes | Mapping) or not isinstance(one, Sequence):
            raise InputError(f"prompt {number} is of type {type(one).__name__}; {expected}")
    return list(prompts)


def refuse_raw(raw: bool | None, for_chat: Mapping[str, object]) -> list[str]:
    """Which of the parameters for chat are given; raises InputError if `raw` leaves them out."""
    given = [name for name, value in for_chat.items() if value or value == ""]
    if given and raw:
        raise InputError(f"`{given[0]}` is for chat, and `raw` leaves all of that out: drop one")
    return given


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    raw: bool | None = None,
    system: str | None = None,
    template_args: Mapping[str, object] | None = None,
    control_tokens: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> EncodedPrompt:
    """Token ids of a text or a conversation.

    Args:
        tokenizer: the model's.
        prompt: a text, or messages that end with the user's.
        raw: whether a text is continued as it is, not answered as a message; None: if the model
            knows no chat.
        system: a system message before the prompt.
        template_args: variables of the chat template, such as `{"enable_thinking": False}`.
        control_tokens: whether control tokens spelt out in the prompt count as such.
        tools: functions that the model may call in answer to a conversation.

    Raises:
        InputError: the messages are none that the model can answer, or parameters for chat are
            given of a text that is to be continued.
    """
    conversation = not isinstance(prompt, str)
    for_chat = {"messages": conversation, "system": system, "template_args": template_args}
    given = refuse_raw(raw, for_chat)
    if raw is None:
        raw = tokenizer.chat_template is None and not given
    if isinstance(prompt, str):
        if raw:
            ids = tokenizer.encode(prompt, add_special=True, control_tokens=control_tokens)
            return EncodedPrompt(ids, True)
        if not prompt.strip():
            raise InputError("the prompt is empty: give a text")
        prompt = [{"role": "user", "content": prompt}]
    elif not prompt or not isinstance(prompt[-1], Mapping) or prompt[-1].get("role") == "assistant":
        raise InputError(
            "the messages end with none of a user; the model answers a user's: end with one"
        )
    ids = tokenizer.encode_chat(
        with_system(prompt, system),
        template_args=template_args,
        control_tokens=control_tokens,
        tools=tools,
    )
    return EncodedPrompt(ids, False)


def with_system(conversation: Sequence[Message], system: str | None) -> Sequence[Message]:
    """Return the conversation, opened by a system message.

    Raise InputError if it has one already.
    """
    if system is None:
        return conversation
    if conversation[0].get("role") == "system":
        raise InputError(
            "`system` is given, and the messages begin with a system message: leave one out"
        )
    return [{"role": "system", "content": system}, *conversation]


def check_lengths(
    config: ModelConfig, ids: Sequence[list[int]], new_tokens: int, max_context: int | None
) -> None:
    """Raise InputError for a prompt of no tokens, of unknown ones, or too long for the model.

    Args:
        config: the model's.
        ids: the tokens of each prompt.
        new_tokens: to generate.
        max_context: most tokens, prompt and answer, whatever the model says; None: as it says.
    """
    context = max_context or config.max_context
    for number, prompt in enumerate(ids, 1):
        if not prompt:
            raise InputError(f"prompt {number} is empty: the model has no tokens for its text")
        if max(prompt) >= config.vocab_size:
            raise InputError(
                f"the tokenizer does not fit the model: token {max(prompt)} of prompt {number} is "
                f"not among its {config.vocab_size}"
            )
        needed = len(prompt) + new_tokens
        if needed > context:
            if max_context:
                whose, way_out = "`max_context`", f"give `max_context={needed}`"
            else:
                whose, scaling = "the model's context", suggest_rope_scaling(config, needed)
                way_out = None
                if scaling is not None:
                    way_out = (
                        f"stretch it with `rope_scaling={scaling!r}`, if its authors advise it"
                    )
            ways = ["shorten the prompt", "lower `max_new_tokens`", *([way_out] if way_out else [])]
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, {needed} with {new_tokens} new ones; "
                f"{whose} is {context} tokens: {', '.join(ways[:-1])} or {ways[-1]}"
            )
