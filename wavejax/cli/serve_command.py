"""The command of `wavejax.serve`."""

import importlib
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

import click

from models.errors import InputError
from wavejax.batching import batch_engine
from wavejax.cli.compilation import keep_compiled_programs
from wavejax.cli.explaining import check_platform, check_variable
from wavejax.cli.guard import main_guard
from wavejax.cli.options import GroupedCommand, fields_of
from wavejax.cli.planning import say_notes
from wavejax.cli.progress import progress_bar
from wavejax.cli.serve_options import serve_options
from wavejax.cli.streams import say
from wavejax.config import WaveConfig
from wavejax.documents.shelf import Shelf, check_shelf
from wavejax.engine.batching.tolerances import default_tolerance
from wavejax.engine.model_sampling import FILE as GENERATION_CONFIG
from wavejax.engine.model_sampling import model_sampling
from wavejax.engine.sampling import Sampler
from wavejax.loading import check_placement, named_attention, open_model
from wavejax.planning.plan import FetchChoice, StoreChoice

QUESTION_TOKENS = 1024  # Room for a question besides its answer, where prompts go on.
KEY_VARIABLE = "WAVEJAX_API_KEY"
# What the extra `serve` installs, and what that in turn needs.
_EXTRA = ("fastapi", "starlette", "pydantic", "uvicorn", "sse_starlette", "prometheus_client")


@click.command(
    cls=GroupedCommand,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@serve_options
def command(
    model: str | None,
    name: str | None,
    max_context: int | None,
    rope_scaling: str | None,
    sampling: str,
    host: str,
    port: int,
    max_request_mib: int,
    drain_seconds: int,
    slots: int,
    max_new_tokens: int,
    queue_limit: int,
    request_seconds: float,
    max_stall_ms: float,
    documents: str | None,
    reuse_slots: bool,
    warmup: bool,
    dtype: str,
    weight_dtype: str,
    store: StoreChoice,
    fetch: FetchChoice,
    attention: str | None,
    **settings: Any,
) -> int:
    """Serve a model by an API that clients of OpenAI's know; SIGTERM or Ctrl-C ends it.

    If WAVEJAX_API_KEY is set, requests must show that key.
    """
    # All that can be wrong is found before the weights are read.
    config = fields_of(WaveConfig, settings)
    wave_or_full = named_attention(attention, config)
    check_placement(wave_or_full, store, fetch)
    check_variable()
    server = server_packages()
    key = api_key()
    if documents is not None:
        check_shelf(Path(documents))
    # Questions to a kept document, and a chat's next turn, go where answers go.
    goes_on = reuse_slots or documents is not None
    questions = QUESTION_TOKENS if goes_on else 0
    opened = open_model(
        model,
        dtype=dtype,
        attention=wave_or_full,
        store=store,
        fetch=fetch,
        rope_scaling=rope_scaling,
        weight_dtype=weight_dtype,
    )
    checkpoint = opened.checkpoint
    opened.tokenizer  # noqa: B018 (one that is missing or damaged is said now)
    sampler = default_sampler(checkpoint.path, sampling)
    name = name or checkpoint.path.resolve().name
    context = max_context or checkpoint.config.max_context
    with server.running.listening_socket(host, port) as bound:
        opened.set_memory_limits([context] * slots, max_new_tokens + questions)
        check_platform()
        say_notes(checkpoint, opened.weight_dtype)
        keep_compiled_programs()
        with progress_bar("loading the model", sys.stderr.isatty()) as report:
            loaded = opened.load(max_context=max_context, progress=report)
        engine = batch_engine(
            loaded,
            slots=slots,
            max_context=max_context,
            max_new_tokens=max_new_tokens + questions,
            queue_limit=queue_limit,
            max_stall_ms=max_stall_ms,
            reuse_slots=reuse_slots,
        )
        if warmup:
            with progress_bar("compiling", sys.stderr.isatty()) as report:
                engine.warmup((Sampler(), sampler), progress=report, appended=goes_on)
        shelf = None
        if documents is not None:
            shelf = Shelf(
                documents,
                generator=engine.generator,
                params=loaded.params,
                tokenizer=loaded.tokenizer,
            )
        limits = server.service.Limits(
            request_bytes=max_request_mib * 2**20,
            request_seconds=request_seconds,
            new_tokens=max_new_tokens,
        )
        service = server.service.Service(
            name=name,
            tokenizer=loaded.tokenizer,
            engine=engine,
            context=context,
            vocab=loaded.config.vocab_size,
            stop_tokens=loaded.stop_tokens,
            sampler=sampler,
            limits=limits,
            shelf=shelf,
            tolerance=default_tolerance(engine.generator.attention),
        )
        where = url_of(bound)

        def ready() -> None:
            if key is None and not loopback(bound):
                say(f"note: anyone who reaches {where} can use it: set {KEY_VARIABLE} to a key")
            most = max(room.slots for room in engine.rooms)  # fewer where not all fit
            say(f"serving {name} on {where}: {most} slots, {context} tokens of context")

        app = server.app.create_app(service, key)
        with engine:
            return server.running.serve(app, bound, drain_seconds, ready)


def server_packages() -> Any:
    """Return the server's modules; raises InputError where the extra is not installed."""
    try:
        for module in ("app", "running", "service"):
            importlib.import_module(f"wavejax.server.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise InputError(
            f"the server needs the package {error.name}, which is not installed: "
            "pip install 'wavejax[serve]'"
        ) from error
    return importlib.import_module("wavejax.server")


def api_key() -> str | None:
    """Return the key that requests must show; raises InputError where it is one that none can."""
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise InputError(f"{KEY_VARIABLE} is empty: set it to a key, or unset it")
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise InputError(
            f"{KEY_VARIABLE} must be printable ASCII with no white space around it: HTTP carries "
            "no other"
        )
    return key


def default_sampler(model: Path, choice: str) -> Sampler:
    """How tokens are drawn where a request does not say.

    Args:
        model: the model's folder or file.
        choice: of --sampling.

    Raises:
        InputError: the model's own values are asked for, and there are none, or one is wrong.
    """
    plain = Sampler(temperature=1.0)
    if choice == "greedy":
        return Sampler()
    if choice == "plain" or (choice == "auto" and not (model / GENERATION_CONFIG).is_file()):
        return plain
    try:
        return Sampler(**model_sampling(model))
    except InputError as error:
        if choice == "model":
            raise
        say(f"note: temperature is 1 where a request does not say: {error}")
        return plain


def url_of(bound: socket.socket) -> str:
    """Where clients find a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


main = main_guard(
    command,
    advice="give fewer --slots, a smaller --max-context or --max-new-tokens, or --store host",
)
