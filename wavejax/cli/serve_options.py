"""The options of `python -m wavejax.serve`, by the groups that --help shows."""

from collections.abc import Callable

import click

from wavejax.cli.loading_options import LOADING_OPTIONS, model_option
from wavejax.cli.options import option

MODEL, NETWORK, REQUESTS = "Model", "Network", "Requests"
_MOST = 2**31 - 1

_OPTIONS = [
    model_option(MODEL),
    option(
        MODEL,
        "--served-model-name",
        "name",
        metavar="NAME",
        help="What requests call it.  [default: the name of its folder or file]",
    ),
    option(
        MODEL,
        "--max-context",
        type=click.IntRange(1, _MOST),
        help="Most tokens of a request, prompt and answer.  [default: as the model says]",
    ),
    option(
        MODEL,
        "--rope-scaling",
        metavar="KIND:FACTOR",
        help="Scale RoPE, as a model's authors may advise: yarn:4, linear:2.",
    ),
    option(
        MODEL,
        "--sampling",
        type=click.Choice(["auto", "model", "plain", "greedy"]),
        default="auto",
        show_default=True,
        help="What holds where a request does not say. model: the values of its "
        "generation_config.json; plain: temperature 1, as OpenAI has it; greedy: the most "
        "probable token; auto: model if it states any, else plain.",
    ),
    option(
        NETWORK,
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on. Others than this machine reach the server only if it is "
        "another one, such as 0.0.0.0: set WAVEJAX_API_KEY then.",
    ),
    option(
        NETWORK,
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="0 takes a free one.",
    ),
    option(
        NETWORK,
        "--max-request-mib",
        type=click.IntRange(1, 2**20),
        default=32,
        show_default=True,
        help="Most MiB of a request's body.",
    ),
    option(
        NETWORK,
        "--drain-seconds",
        type=click.IntRange(1, _MOST),
        default=30,
        show_default=True,
        help="At SIGTERM: how long answers that come may take to end.",
    ),
    option(
        REQUESTS,
        "--slots",
        type=click.IntRange(1, 4096),
        default=8,
        show_default=True,
        help="Answers side by side.",
    ),
    option(
        REQUESTS,
        "--max-new-tokens",
        type=click.IntRange(1, _MOST),
        default=2048,
        show_default=True,
        help="Most tokens of an answer; so many where a request does not say.",
    ),
    option(
        REQUESTS,
        "--queue-limit",
        type=click.IntRange(1, _MOST),
        default=64,
        show_default=True,
        help="Most requests that wait; others are refused with status 429.",
    ),
    option(
        REQUESTS,
        "--request-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=1800.0,
        show_default=True,
        help="Most seconds of a request, waiting included; then it is cancelled.",
    ),
    option(
        REQUESTS,
        "--max-stall-ms",
        type=click.FloatRange(min=0, min_open=True),
        default=250.0,
        show_default=True,
        help="The longest that an answer waits while others' prompts are read.",
    ),
    option(
        REQUESTS,
        "--documents",
        metavar="DIR",
        help="A folder of kept documents (`wavejax.generate --save-document DIR/NAME`): requests "
        "name one by the field `document`, and those that begin with one reuse it.",
    ),
    option(
        REQUESTS,
        "--reuse-slots/--no-reuse-slots",
        default=False,
        show_default=True,
        help="A prompt that begins with what a free slot still holds goes on from there: a chat's "
        "next turn, or a second question to a text. Its answer then depends on what came before.",
    ),
    option(
        REQUESTS,
        "--warmup/--no-warmup",
        default=False,
        show_default=True,
        help="Compile all programs before the first request.",
    ),
    *LOADING_OPTIONS,
]


def serve_options(function: Callable) -> Callable:
    """Give a command's function all options."""
    for decorate in reversed(_OPTIONS):
        function = decorate(function)
    return function
