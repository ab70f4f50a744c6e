"""Generates text from a model over long prompts: `python -m wavejax.generate --help`."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import click
import jax
import jax.numpy as jnp

from models.checkpoint import Checkpoint, find_default_model, open_checkpoint
from models.errors import InputError
from models.tokenizer import Tokenizer, load_tokenizer
from wavejax.cli_support import fields_of, main_guard, options_from, progress_bar, read_prompts
from wavejax.config import WaveConfig
from wavejax.dense_attention import DenseAttention
from wavejax.generator import Generator
from wavejax.memory import check_memory
from wavejax.run import Run
from wavejax.sampling import Sampler
from wavejax.wave_attention import WaveAttention


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    help="Hugging Face folder, GGUF file or converted checkpoint.  "
    "[default: the installed SmolLM2 package]",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated.")
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text, - for the standard input; may be repeated: a batch.",
)
@click.option(
    "--chat/--raw",
    "chat",
    default=None,
    help="As a message to a chat model, or as it is.  [default: chat, if the model can]",
)
@click.option("--attention", type=click.Choice(["wave", "full"]), default="wave", show_default=True)
@click.option(
    "--store",
    type=click.Choice(["host", "device"]),
    default="host",
    show_default=True,
    help="Where wave attention keeps the keys and values.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--max-context",
    type=click.IntRange(min=1),
    help="Most tokens, prompt and answer, whatever the model says.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, bfloat16 elsewhere.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of the sampling; the same seed gives the same text.",
)
@options_from(Sampler)
@options_from(WaveConfig)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object at the end, and no text before."
)
@click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr.  [default: if it is a terminal]"
)
def command(
    model: str | None,
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    chat: bool | None,
    attention: str,
    store: Literal["host", "device"],
    max_new_tokens: int,
    max_context: int | None,
    dtype: str,
    seed: int,
    as_json: bool,
    progress: bool | None,
    **settings: Any,
) -> None:
    """Generate text with full or with wave attention, and print it as it comes."""
    # All that can be wrong with the input is found before the weights are read.
    sampler, config = fields_of(Sampler, settings), fields_of(WaveConfig, settings)
    texts = read_prompts(prompts, prompt_files)
    checkpoint = open_checkpoint(model if model is not None else find_default_model())
    tokenizer = load_tokenizer(checkpoint.path)
    ids = encode_prompts(tokenizer, texts, chat)
    check_lengths(checkpoint, ids, max_new_tokens, max_context)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    wave_or_full = WaveAttention(config, store) if attention == "wave" else DenseAttention()
    check_memory(
        checkpoint.config,
        wave_or_full,
        len(ids),
        max(map(len, ids)),
        max_new_tokens,
        jnp.dtype(dtype),
        checkpoint.parameter_bytes(dtype),
    )
    generator = Generator(
        checkpoint.config,
        wave_or_full,
        sampler,
        tuple(sorted(tokenizer.stop_ids | set(checkpoint.config.stop_token_ids))),
    )

    shown = sys.stderr.isatty() if progress is None else progress
    with progress_bar("loading the model", shown) as report:
        params = checkpoint.load_params(dtype, report)
    run = Run(generator, tokenizer, len(ids), quiet=as_json)
    run.generate(params, ids, max_new_tokens, seed, shown)
    if as_json:
        print(json.dumps(run.as_json(str(checkpoint.path), attention, ids), ensure_ascii=False))
    print(run.facts_line(), file=sys.stderr)


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], chat: bool | None
) -> list[list[int]]:
    """Token ids of each prompt, as a chat message or as it is; raises InputError."""
    if chat is None:
        chat = tokenizer.chat_template is not None
    if chat:
        return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    return [tokenizer.encode(text, add_special=True) for text in texts]


def check_lengths(
    checkpoint: Checkpoint, ids: list[list[int]], new_tokens: int, max_context: int | None
) -> None:
    """Raises InputError for a prompt of no tokens, of unknown ones, or too long for the model."""
    context = max_context or checkpoint.config.max_context
    for number, prompt in enumerate(ids, 1):
        if not prompt:
            raise InputError(f"prompt {number} is empty: the model has no tokens for its text")
        if max(prompt) >= checkpoint.config.vocab_size:
            raise InputError(
                f"the tokenizer does not fit the model: token {max(prompt)} of prompt {number} is "
                f"not among its {checkpoint.config.vocab_size}"
            )
        needed = len(prompt) + new_tokens
        if needed > context:
            whose = "--max-context" if max_context else "the model's context"
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, {needed} with {new_tokens} new ones; "
                f"{whose} is {context} tokens: shorten the prompt, lower --max-new-tokens, or "
                f"override with --max-context {needed}"
            )


main = main_guard(command)

if __name__ == "__main__":
    sys.exit(main())
