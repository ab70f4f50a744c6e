"""The options of `python -m wavejax.generate`, by the groups that --help shows."""

from collections.abc import Callable

import click

from wavejax.cli.explaining import HELP
from wavejax.cli.loading_options import LOADING_OPTIONS, MEMORY, model_option
from wavejax.cli.options import option, options_from
from wavejax.engine.sampling import Sampler

INPUT, SAMPLING, OUTPUT = "Input", "Sampling", "Output"

_OPTIONS = [
    model_option(INPUT),
    option(INPUT, "--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated."),
    option(
        INPUT,
        "--prompt-file",
        "prompt_files",
        multiple=True,
        metavar="FILE",
        help="UTF-8 text, - for the standard input; may be repeated: a batch.",
    ),
    option(
        INPUT,
        "--messages",
        "message_files",
        multiple=True,
        metavar="FILE",
        help='In place of a prompt, a conversation: a JSON list of {"role": "system", "user" or '
        '"assistant", "content": TEXT}; may be repeated: a batch.',
    ),
    option(
        INPUT,
        "--save-document",
        metavar="FOLDER",
        help="Read the prompt, a document, and keep it in this folder for --document; then end.",
    ),
    option(
        INPUT,
        "--document",
        metavar="FOLDER",
        help="Ask a document that --save-document kept: the prompt is a question, and no other "
        "tokens are read.",
    ),
    option(
        INPUT,
        "--system",
        metavar="TEXT",
        help="A system message before each prompt or conversation.",
    ),
    option(
        INPUT,
        "--chat/--raw",
        "chat",
        default=None,
        help="As a message to a chat model, or as it is.  [default: chat, if the model can]",
    ),
    option(
        INPUT,
        "--template-arg",
        "template_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="A variable of the chat template, such as enable_thinking=false: JSON, or else "
        "text; may be repeated.",
    ),
    option(
        INPUT,
        "--allow-control-tokens",
        is_flag=True,
        help="Let control tokens that a prompt spells out, such as <|im_end|>, count as such. "
        "Without it they are text.",
    ),
    option(
        INPUT,
        "--max-context",
        type=click.IntRange(min=1),
        help="Most tokens, prompt and answer, whatever the model says.",
    ),
    option(
        INPUT,
        "--rope-scaling",
        metavar="KIND:FACTOR",
        help="Scale RoPE, as a model's authors may advise for prompts past its context and its "
        "file may not state: yarn:4 makes the context four times as long; linear:2.",
    ),
    option(
        SAMPLING,
        "--max-new-tokens",
        type=click.IntRange(1, 2**31 - 1),
        default=256,
        show_default=True,
    ),
    option(
        SAMPLING,
        "--stop",
        "stops",
        multiple=True,
        metavar="TEXT",
        help="End an answer before this text; may be repeated.",
    ),
    option(
        SAMPLING,
        "--sampling",
        "sampling",
        type=click.Choice(["model", "greedy"]),
        default="greedy",
        show_default=True,
        help="What holds where no option says else. model: the values of its "
        "generation_config.json; greedy: the defaults below.",
    ),
    options_from(Sampler, SAMPLING),
    option(
        SAMPLING,
        "--samples",
        type=click.IntRange(1, 65536),
        default=1,
        show_default=True,
        help="Answers of each prompt, sampled side by side in one batch.",
    ),
    option(
        SAMPLING,
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="Fixes the noise of each answer, by its place in the batch and its step: the same "
        "seed gives the same text, if nothing else is changed.",
    ),
    option(
        OUTPUT,
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object at the end, and no text before; when interrupted, with what "
        "there is.",
    ),
    option(
        OUTPUT,
        "--progress/--no-progress",
        default=None,
        help="Bars on stderr.  [default: if it is a terminal]",
    ),
    option(OUTPUT, "--explain", "explained", is_flag=True, help=HELP),
    option(
        MEMORY,
        "--plan",
        "only_plan",
        is_flag=True,
        help="Say what the run would take of memory and what there is; read no weights.",
    ),
    option(
        MEMORY,
        "--context",
        type=click.IntRange(1, 2**31 - 1),
        help="With --plan, in place of a prompt: its tokens.",
    ),
    option(
        MEMORY,
        "--batch",
        type=click.IntRange(1, 65536),
        help="With --context: how many prompts.  [default: 1]",
    ),
    *LOADING_OPTIONS,
]


def generate_options(function: Callable) -> Callable:
    """Give a command's function all options."""
    for decorate in reversed(_OPTIONS):
        function = decorate(function)
    return function
