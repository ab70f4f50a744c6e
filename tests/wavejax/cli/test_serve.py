"""`python -m wavejax.serve`: how it starts, what it refuses, and how a signal ends it."""

import builtins
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wavejax.cli.conftest import SMALL_ZONES, Result
from wavejax.serve import main

ROOT = Path(__file__).parents[3]
READY = re.compile(r"serving (\S+) on (http://127\.0\.0\.1:\d+): (\d+) slots, (\d+) tokens")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


class Process:
    """A server of its own, and what it says on stderr."""

    def __init__(self, *arguments: object, **environment: str):
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wavejax.serve", *map(str, arguments)],
            env=os.environ | QUICK | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            found = READY.search(line)
            if found:
                self.url = found[2]
                self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        assert self._ready.wait(120)
        assert self.url, self.lines

    def end(self) -> int:
        status = self.process.wait(60)
        self._reader.join(10)
        return status


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, **environment: str) -> Process:
            made = Process(*arguments, **environment)

            def kill() -> None:
                made.process.kill()
                made.end()

            stack.callback(kill)
            return made

        yield start


def test_sigterm_drains(serve: Callable[..., Process], tiny: Path) -> None:
    """A stream that has begun goes on to its end; nobody else is let in; the status is 0."""
    server = serve(
        *("--model", tiny, "--port", 0, "--slots", 2, "--attention", "full"),
        *("--served-model-name", "mine", "--sampling", "greedy", "--max-new-tokens", 256),
        WAVEJAX_API_KEY="a-key",
    )
    server.wait_ready()
    assert server.lines[-1].endswith("2 slots, 512 tokens of context")
    assert httpx.get(f"{server.url}/v1/models", timeout=120).status_code == 401
    body: Any = {"model": "mine", "prompt": "secret text", "max_tokens": 250, "ignore_eos": True}
    key = {"Authorization": "Bearer a-key"}
    address = f"{server.url}/v1/completions"
    asked = {"json": {**body, "stream": True}, "headers": key, "timeout": 120}
    with httpx.stream("POST", address, **asked) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert server.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    *_, models, completion = server.lines
    assert " GET /v1/models 401 - tokens" in models
    assert " POST /v1/completions 200 12+250 tokens" in completion
    assert "secret" not in "".join(server.lines)
    assert "a-key" not in "".join(server.lines)
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""


@pytest.mark.slow(40)
def test_it_answers_questions_to_kept_documents(
    serve: Callable[..., Process], generate: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    """Of wave attention, kept by the other command: the answer is that command's."""
    text, kept = tmp_path / "text", tmp_path / "kept"
    text.write_text("The town lies in a wide valley. " * 10)
    settings = ["--model", tiny, *SMALL_ZONES]
    save = ["--prompt-file", text, "--save-document", kept / "valley"]
    assert generate(*settings, *save).status == 0
    asked = ["--document", kept / "valley", "--prompt", "Where?", "--max-new-tokens", 20, "--json"]
    told = json.loads(generate(*settings, *asked).out)
    server = serve(
        *settings, "--port", 0, "--slots", 1, "--max-new-tokens", 64, "--documents", kept
    )
    server.wait_ready()
    body = {
        "messages": [{"role": "user", "content": "Where?"}],
        "document": "valley",
        "temperature": 0,
        "max_tokens": 20,
    }
    got = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert got["choices"][0]["message"]["content"] == told["answers"][0]["text"]
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] > 300
    body |= {"document": "hill"}
    missing = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert missing.status_code == 404
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error of start-up."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_port_that_is_taken(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = said(capsys, "--model", tiny, "--port", port)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in error
    assert "--port" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid is no address"),
        (("--host", "192.0.2.1", "--port", "0"), "cannot listen on 192.0.2.1"),
        (("--port", "70000"), "--port"),
        (("--slots", "0"), "--slots"),
        (("--sampling", "model"), "generation_config.json"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--documents", "/nowhere"), "/nowhere is no folder"),
        (("--attention", "full", "--store", "host"), "--store host"),
    ],
)
def test_bad_options(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in said(capsys, "--model", tiny, *arguments)


@pytest.mark.parametrize("key", ["", "  ", " spaced", "ключ"])
def test_keys_that_none_can_show(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("WAVEJAX_API_KEY", key)
    assert "WAVEJAX_API_KEY" in said(capsys, "--model", tiny)


def test_without_the_extra(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("wavejax.server")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "fastapi":
            raise ModuleNotFoundError(f"No module named {name!r}", name="fastapi")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    error = said(capsys, "--model", tiny)
    assert "fastapi" in error
    assert "pip install 'wavejax[serve]'" in error


def test_help_needs_no_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["--help"]) == 0
    assert "WAVEJAX_API_KEY" in capsys.readouterr().out
