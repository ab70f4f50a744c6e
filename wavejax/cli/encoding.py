"""Prompts and conversations as token ids, and whether the model can take them."""

from collections.abc import Sequence

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from models.rope_option import suggest_rope_scaling
from models.text.tokenizer import Tokenizer
from wavejax.cli.prompts import (
    parse_template_args,
    read_conversations,
    read_prompts,
    with_system,
)


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
        prompts, prompt_files, message_files: as on the command line.
        chat: whether a prompt is a chat message; None: if the model knows chat.
        system: the system message of each, if there is one.
        template_args: `KEY=VALUE`, variables of the chat template.
        control_tokens: whether control tokens spelt out in a text count as such.
    """
    if message_files and (prompts or prompt_files):
        raise InputError("give --messages or a prompt, not both: the messages end with the prompt")
    for_chat = {"--messages": message_files, "--system": system, "--template-arg": template_args}
    given = [flag for flag, value in for_chat.items() if value or value == ""]
    if given and chat is False:
        raise InputError(f"{given[0]} is for chat, and --raw leaves all of that out: drop one")
    values = parse_template_args(template_args)
    if message_files:
        conversations = read_conversations(message_files)
    else:
        texts = read_prompts(prompts, prompt_files)
        if chat is None:
            chat = tokenizer.chat_template is not None or bool(given)
        if not chat:
            ids = [
                tokenizer.encode(text, add_special=True, control_tokens=control_tokens)
                for text in texts
            ]
            return ids, True
        conversations = [[{"role": "user", "content": text}] for text in texts]
    ids = [
        tokenizer.encode_chat(
            with_system(conversation, system), template_args=values, control_tokens=control_tokens
        )
        for conversation in conversations
    ]
    return ids, False


def check_lengths(
    checkpoint: Checkpoint, ids: list[list[int]], new_tokens: int, max_context: int | None
) -> None:
    """Raises InputError for a prompt of no tokens, of unknown ones, or too long for the model."""
    config = checkpoint.config
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
                whose, way_out = "--max-context", f"give --max-context {needed}"
            else:
                whose, scaling = "the model's context", suggest_rope_scaling(config, needed)
                way_out = None
                if scaling is not None:
                    way_out = f"stretch it with --rope-scaling {scaling}, if its authors advise it"
            ways = ["shorten the prompt", "lower --max-new-tokens", *([way_out] if way_out else [])]
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, {needed} with {new_tokens} new ones; "
                f"{whose} is {context} tokens: {', '.join(ways[:-1])} or {ways[-1]}"
            )
