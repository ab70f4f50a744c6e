"""The prompts and conversations of the command line as token ids."""

from collections.abc import Sequence

from models.errors import InputError
from models.text.tokenizer import Tokenizer
from wavejax.cli.prompts import parse_template_args, read_conversations, read_prompts
from wavejax.engine.prompt_text import Prompt, encode_prompt, refuse_raw


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    prompt_files: Sequence[str],
    message_files: Sequence[str],
    *,
    chat: bool | None,
    system: str | None,
    template_args: Sequence[str],
    control_tokens: bool,
) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt or conversation, and whether they are texts to be continued.

    Raises InputError.

    Args:
        tokenizer: the model's.
        prompts: as on the command line, as the next two are.
        prompt_files: files of a prompt each.
        message_files: files of a conversation each.
        chat: whether a prompt is a chat message; None: if the model knows chat.
        system: the system message of each, if there is one.
        template_args: `KEY=VALUE`, variables of the chat template.
        control_tokens: whether control tokens spelt out in a text count as such.
    """
    if message_files and (prompts or prompt_files):
        raise InputError("give --messages or a prompt, not both: the messages end with the prompt")
    raw = None if chat is None else not chat
    # Before files are read.
    refuse_raw(raw, {"messages": message_files, "system": system, "template_args": template_args})
    values = parse_template_args(template_args)
    given: Sequence[Prompt] = (
        read_conversations(message_files) if message_files else read_prompts(prompts, prompt_files)
    )
    encoded = [
        encode_prompt(
            tokenizer,
            prompt,
            raw=raw,
            system=system,
            template_args=values,
            control_tokens=control_tokens,
        )
        for prompt in given
    ]
    return [prompt.ids for prompt in encoded], encoded[0].raw
