"""Generates text from a model over long prompts: `python -m wavejax.generate --help`."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click
import jax

from models.checkpoint import Checkpoint, find_default_model, open_checkpoint
from models.errors import InputError
from models.tokenizer import Tokenizer, load_tokenizer
from models.unstacked import unstack_layers
from wavejax.cli_support import (
    exit_process,
    fields_of,
    keep_compiled_programs,
    main_guard,
    options_from,
    progress_bar,
    read_prompts,
)
from wavejax.config import WaveConfig
from wavejax.dense_attention import DenseAttention
from wavejax.generator import Generator
from wavejax.memory import set_memory_limits
from wavejax.plan import FetchChoice, Plan, StoreChoice, make_plan, pinned_need
from wavejax.plan_table import plan_json, plan_text
from wavejax.run import Run
from wavejax.sampling import Sampler


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
    type=click.Choice(["auto", "host", "device"]),
    default="auto",
    show_default=True,
    help="Where wave attention keeps the keys and values; auto: on the device while they fit.",
)
@click.option(
    "--fetch",
    type=click.Choice(["auto", "in_place", "staged"]),
    default="auto",
    show_default=True,
    help="How rows on the host reach the device; in_place: kernels read them there; staged: the "
    "host gathers and sends them; auto: in_place where kernels can.",
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
    "--plan",
    "only_plan",
    is_flag=True,
    help="Say what the run would take of memory and what there is; read no weights.",
)
@click.option(
    "--context",
    type=click.IntRange(1, 2**31 - 1),
    help="With --plan, in place of a prompt: its tokens.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 65536),
    help="With --context: how many prompts.  [default: 1]",
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
    store: StoreChoice,
    fetch: FetchChoice,
    max_new_tokens: int,
    max_context: int | None,
    dtype: str,
    seed: int,
    as_json: bool,
    only_plan: bool,
    context: int | None,
    batch: int | None,
    progress: bool | None,
    **settings: Any,
) -> None:
    """Generate text with full or with wave attention, and print it as it comes."""
    # All that can be wrong with the input is found before the weights are read.
    sampler, config = fields_of(Sampler, settings), fields_of(WaveConfig, settings)
    wave_or_full = config if attention == "wave" else DenseAttention()
    check_placement(attention, store, fetch)
    path = model if model is not None else find_default_model()
    if context is not None or batch is not None:
        check_context(only_plan, context, [*prompts, *prompt_files])
        checkpoint = open_checkpoint(path)
        lengths = [context or 1] * (batch or 1)
        plan = plan_run(checkpoint, wave_or_full, lengths, max_new_tokens, dtype, store, fetch)
        print_plan(plan, checkpoint, as_json)
        return
    texts = read_prompts(prompts, prompt_files)
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.path)
    ids = encode_prompts(tokenizer, texts, chat)
    check_lengths(checkpoint, ids, max_new_tokens, max_context)
    lengths = [*map(len, ids)]
    plan = plan_run(checkpoint, wave_or_full, lengths, max_new_tokens, dtype, store, fetch)
    if only_plan:
        print_plan(plan, checkpoint, as_json)
        return
    plan.check()
    if plan.shrunk is not None:
        print(f"note: store: {plan.need.rows_on}: {plan.reason}", file=sys.stderr)
    keep_compiled_programs()
    generator = Generator(
        checkpoint.config,
        plan.attention,
        sampler,
        tuple(sorted(tokenizer.stop_ids | set(checkpoint.config.stop_token_ids))),
    )

    shown = sys.stderr.isatty() if progress is None else progress
    with progress_bar("loading the model", shown) as report:
        params = checkpoint.load_params(plan.dtype, report)
    if unstacks(generator, plan):
        params = unstack_layers(params)
    run = Run(generator, tokenizer, len(ids), quiet=as_json)
    run.generate(params, ids, max_new_tokens, seed, shown)
    if as_json:
        print(json.dumps(run.as_json(str(checkpoint.path), attention, ids), ensure_ascii=False))
    print(run.facts_line(), file=sys.stderr)


def unstacks(generator: Generator, plan: Plan) -> bool:
    """Whether each layer gets arrays of its own: where that is faster, if there is room."""
    # While it is done there is one stack twice: with a short prompt, the most that the run takes.
    room = plan.free.device
    fits = room is None or plan.need.weights + plan.need.loading <= room
    return generator.unrolls and fits


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


def check_placement(attention: str, store: StoreChoice, fetch: FetchChoice) -> None:
    """Raises InputError where --store and --fetch ask for what would not be done."""
    if attention == "full" and store == "host":
        raise InputError(
            "--store host is for wave attention, full attention keeps all on the device: leave it "
            "out, or give --attention wave"
        )
    if attention == "full" and fetch != "auto":
        raise InputError(
            "--fetch is for wave attention with rows on the host: leave it out, or give "
            "--attention wave"
        )
    if store == "device" and fetch != "auto":
        raise InputError("--fetch is for rows on the host: leave it out, or give --store host")


def check_context(only_plan: bool, context: int | None, prompts: Sequence[str]) -> None:
    """Raises InputError where --context and --batch make no sense."""
    if not only_plan:
        raise InputError("--context and --batch are for --plan; give a prompt to generate from")
    if context is None:
        raise InputError("--batch needs --context; a batch of prompts has its own size")
    if prompts:
        raise InputError("give --context or a prompt, not both: the prompt has a length")


def plan_run(
    checkpoint: Checkpoint,
    attention: WaveConfig | DenseAttention,
    lengths: Sequence[int],
    new_tokens: int,
    dtype: str,
    store: StoreChoice,
    fetch: FetchChoice,
) -> Plan:
    """Plans the run, and sets XLA's limits before anything starts JAX's device."""
    shape = checkpoint.config, attention, len(lengths), max(lengths), new_tokens
    # Where there is memory to pin, auto is bfloat16.
    set_memory_limits(pinned_need(*shape, "bfloat16" if dtype == "auto" else dtype, fetch))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return make_plan(*shape, dtype, store=store, fetch=fetch)


def print_plan(plan: Plan, checkpoint: Checkpoint, as_json: bool) -> None:
    """Prints the plan; raises InputError if it does not fit."""
    name = str(checkpoint.path)
    print(json.dumps(plan_json(plan, name)) if as_json else plan_text(plan, checkpoint.path.name))
    plan.check()


main = main_guard(
    command,
    advice="use a shorter prompt, fewer prompts, --store host or, with rows there, a smaller "
    "--cache-fraction; --plan shows what a run takes",
)

if __name__ == "__main__":
    exit_process(main())
