"""Replays a trace of requests against a running server: times, throughput, a plot.

    python scripts/replay_trace.py --requests 100 --rate 2 --documents 4 --plot load.png
    python scripts/replay_trace.py --trace trace.jsonl --out results.json

Each request is sent when the trace says so, whatever became of the others. A trace is a file of
JSON lines (`load_trace.Arrival`), or is made by a seed. Prompts are random token ids. The time
between tokens is that between the parts of a stream, as a client sees them. The key of a server
that wants one is WAVEJAX_API_KEY. A run that is interrupted tells what it has, and leaves it in
NAME.unfinished.json.
"""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from load_report import plot, print_table, summary
from load_trace import Arrival, Range, make_trace, prompt_of, read_trace, write_trace

from models.errors import InputError
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.evaluation.files import write_growing
from wavejax.evaluation.plots import pyplot
from wavejax.evaluation.setup import make_room_for

WORDS = "The town lies in a wide valley; its bridge, of 1907, leads over the river Elm to a mill."
WRITTEN_EVERY = 1.0  # Seconds from one writing of the results to the next.


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is asked.

    Attributes:
        client: for its address.
        model: its name.
        words: token ids that prompts are made of.
    """

    client: httpx.AsyncClient
    model: str
    words: np.ndarray


async def reach(client: httpx.AsyncClient) -> Server:
    """Ask a server for its model; raises InputError where it does not answer so."""
    try:
        listed = await client.get("/v1/models")
        listed.raise_for_status()
        model = listed.json()["data"][0]["id"]
        found = await client.post("/tokenize", json={"prompt": WORDS, "add_special_tokens": False})
        found.raise_for_status()
        return Server(client, model, np.unique(found.json()["tokens"]))
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = "; set WAVEJAX_API_KEY to its key" if status == 401 else ""
        raise InputError(f"{error.request.url} answers with status {status}{hint}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"--url: no server answers at {client.base_url} ({reason}): start one with "
            "`python -m wavejax.serve`"
        ) from None


async def ask(server: Server, one: Arrival, prompt: list[int], start: float) -> dict[str, Any]:
    """Send one request, and read its stream.

    Args:
        server: which is asked.
        one: the request.
        prompt: token ids.
        start: of the replay, by `time.perf_counter`.

    Returns:
        its fields, and: sent_s, since the replay's start; total_s, first_token_s and gaps_s, from
        there on; what `usage` says; or `error`, with what there was to that moment.
    """
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": one.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, came, usage = time.perf_counter(), list[float](), dict[str, Any]()
    result: dict[str, Any] = dataclasses.asdict(one) | {"sent_s": sent - start}
    try:
        async with server.client.stream("POST", "/v1/completions", json=body) as got:
            if got.status_code != 200:
                result["error"] = _message(await got.aread(), f"status {got.status_code}")
            async for line in got.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    result["error"] = chunk["error"]["message"]
                elif chunk.get("usage"):
                    usage = chunk["usage"]
                elif chunk["choices"]:
                    came.append(time.perf_counter())
    except httpx.HTTPError as error:
        result["error"] = str(error) or type(error).__name__
    if not usage:
        result.setdefault("error", "the stream ended early")
    result |= {
        "total_s": time.perf_counter() - sent,
        "first_token_s": came[0] - sent if came else None,
        "gaps_s": np.diff(came).tolist(),
        "prompt_tokens": usage.get("prompt_tokens", len(prompt)),
        "completion_tokens": usage.get("completion_tokens", 0),
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    }
    return result


async def replay(
    url: str,
    trace: Sequence[Arrival],
    seed: int,
    take: Callable[[dict[str, Any]], None],
) -> None:
    """Send all requests of a trace, each at its time.

    Args:
        url: of the server.
        trace: the requests.
        seed: of the prompts.
        take: called with each result of `ask`, in the order of their ends.

    Raises:
        InputError: no server answers.
    """
    key = os.environ.get("WAVEJAX_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    given: dict[str, Any] = {"base_url": url, "headers": headers, "limits": limits}
    async with httpx.AsyncClient(timeout=None, **given) as client:
        server = await reach(client)
        prompts = [prompt_of(trace, number, server.words, seed) for number in range(len(trace))]
        start = time.perf_counter()

        async def one(number: int) -> None:
            await asyncio.sleep(max(0.0, start + trace[number].arrival_s - time.perf_counter()))
            take(await ask(server, trace[number], prompts[number], start))

        await asyncio.gather(*(one(number) for number in range(len(trace))))


def _message(body: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return otherwise


def _range(_: Any, option: click.Parameter, text: str) -> Range:
    low, _, high = text.partition(":")
    if not (low.isdigit() and (high or low).isdigit() and 0 < int(low) <= int(high or low)):
        raise click.BadParameter(f"{text!r} is no range: give LEAST:MOST, or one number, from 1 up")
    return int(low), int(high or low)


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--trace", type=click.Path(path_type=Path), help="A trace, in place of a made one.")
@click.option("--requests", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Requests a second, on average.",
)
@click.option("--documents", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--document-tokens", default="1024:8192", show_default=True, callback=_range)
@click.option("--question-tokens", default="16:64", show_default=True, callback=_range)
@click.option("--answer-tokens", default="32:128", show_default=True, callback=_range)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--save-trace", type=click.Path(path_type=Path), help="Write the trace there too.")
@click.option("--out", type=click.Path(path_type=Path), help="Write all results there, as JSON.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="A PNG file.")
def command(
    url: str,
    trace: Path | None,
    seed: int,
    save_trace: Path | None,
    out: Path | None,
    plot_path: Path | None,
    **made: Any,
) -> int:
    """Replay a trace of requests against a running server; exit status 1 if any failed."""
    make_room_for(save_trace, out, plot_path)
    if plot_path is not None:
        pyplot()
    arrivals = read_trace(trace) if trace is not None else make_trace(**made, seed=seed)
    if save_trace is not None:
        write_trace(save_trace, arrivals)
    results: list[dict[str, Any]] = []
    written = 0.0

    def write(*, whole: bool) -> None:
        nonlocal written
        written = time.monotonic()
        if out is not None:
            report = {"url": url, "seed": seed, "summary": summary(results), "results": results}
            write_growing(out, json.dumps(report, indent=1), whole=whole)

    def take(result: dict[str, Any]) -> None:
        results.append(result)
        if time.monotonic() - written >= WRITTEN_EVERY:
            write(whole=False)

    try:
        asyncio.run(replay(url, arrivals, seed, take))
    finally:
        if results:
            write(whole=len(results) == len(arrivals))
            print_table(results)
            if plot_path is not None:
                plot(results, plot_path)
    return int(any("error" in one for one in results))


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
