"""The key, sizes, times, the queue, clients that go, and what is logged of all that."""

import contextlib
import dataclasses
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.wavejax.server.conftest import HTTP, NAME, Running, make_engine, wait_for
from wavejax import LanguageModel
from wavejax.engine.batching import BatchEngine, Stats
from wavejax.server.service import Limits

HELLO: Any = [{"role": "user", "content": "A secret word"}]
CHAT: Any = {"model": NAME, "messages": HELLO}
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} 127\.0\.0\.1 (?P<method>[A-Z]+) (?P<path>\S+) "
    r"(?P<status>\d{3}) (?P<tokens>\d+\+\d+|-) tokens \d+\.\d{3} s"
)


class Slow:
    """The engine, whose every event takes a while: answers last long enough to be left."""

    def __init__(self, engine: BatchEngine):
        self.engine, self.rooms = engine, engine.rooms

    @property
    def alive(self) -> bool:
        return self.engine.alive

    def stats(self) -> Stats:
        return self.engine.stats()

    def submit(self, request: Any, on_event: Callable[[Any], None]) -> Any:
        def later(event: Any) -> None:
            time.sleep(0.02)
            on_event(event)

        # A random model may say its end at any token.
        return self.engine.submit(dataclasses.replace(request, stop_tokens=()), later)


@pytest.fixture(scope="module")
def slow(start: Callable[..., Running], tiny_engine: BatchEngine) -> Running:
    return start(engine=Slow(tiny_engine), limits=Limits(new_tokens=400))


@pytest.fixture(scope="module")
def stopped(
    start: Callable[..., Running], tiny_model: LanguageModel
) -> Iterator[Callable[..., Running]]:
    """Makes servers whose engine does not work, so that all requests wait."""
    with contextlib.ExitStack() as stack:

        def make(queue_limit: int, seconds: float) -> Running:
            engine = make_engine(tiny_model, queue_limit=queue_limit)
            stack.callback(engine.close)
            return start(engine=engine, limits=Limits(request_seconds=seconds))

        yield make


def test_the_key(start: Callable[..., Running], access_lines: list[str]) -> None:
    server = start(key="s3cret")
    assert server.client.models.list().data
    for wrong in ("s3cre", "s3cret0", ""):
        client = server.client.with_options(api_key=wrong or "x")
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.code == "invalid_api_key"
    got = HTTP.post(f"{server.url}/v1/completions", content=b"no JSON")
    assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
    assert got.json()["error"]["type"] == "authentication_error"
    for path in ("/tokenize", "/openapi.json", "/v1/models", "/nothing"):
        assert HTTP.get(server.url + path).status_code == 401
    for path in ("/", "/health", "/metrics"):
        assert HTTP.get(server.url + path).status_code == 200
    assert "s3cre" not in "".join(access_lines)


def test_large_bodies(start: Callable[..., Running]) -> None:
    server = start(limits=Limits(request_bytes=1000))

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    for content in (b"x" * 1001, chunks()):
        got = HTTP.post(
            f"{server.url}/v1/completions",
            content=content,
            headers={"Content-Type": "application/json"},
        )
        error = got.json()["error"]
        assert (got.status_code, error["code"]) == (413, "request_too_large")
        assert "1000" in error["message"]


def test_a_body_that_does_not_come(start: Callable[..., Running]) -> None:
    server = start(limits=Limits(body_seconds=0.2))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = client.recv(4096)
    assert b" 408 " in answer.partition(b"\r\n")[0]


def test_a_request_that_takes_too_long(stopped: Callable[..., Running]) -> None:
    server = stopped(queue_limit=4, seconds=0.2)
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.chat.completions.create(**CHAT)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    # A stream has begun, and tells it within.
    stream = server.client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match=r"0\.2 s"):
        list(stream)


def test_a_full_queue(stopped: Callable[..., Running]) -> None:
    server = stopped(queue_limit=2, seconds=60)
    with server.client.chat.completions.create(**CHAT, stream=True):
        wait_for(lambda: server.service.engine.stats().waiting == 1)
        # Of two samples one has no place: none waits.
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.chat.completions.create(**CHAT, n=2)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        assert "2 may" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes(slow: Running, stream: bool, access_lines: list[str]) -> None:
    """Its request ends, its slot is free, and the log says so."""
    engine = slow.service.engine
    before = engine.stats()
    if stream:
        answer = slow.client.chat.completions.create(**CHAT, stream=True, n=2)
        next(iter(answer))
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            slow.client.with_options(timeout=2).chat.completions.create(**CHAT, n=2)
    wait_for(lambda: engine.stats().unfinished == 0)
    after = engine.stats()
    assert after.submitted == before.submitted + 2
    assert after.finished["interrupted"] == before.finished.get("interrupted", 0) + 2
    wait_for(lambda: len(access_lines) == 1)
    found = LINE.fullmatch(access_lines[0])
    assert found is not None, access_lines
    assert found["status"] == "499"


def test_log_lines(server: Running, access_lines: list[str]) -> None:
    """One a request: no text, no query, nothing that ends the line."""
    url, create = server.url, server.client.chat.completions.create
    for number, ask in enumerate(
        [
            lambda: create(**CHAT, max_tokens=3, temperature=0),
            lambda: list(create(**CHAT, max_tokens=4, temperature=0, stream=True)),
            lambda: HTTP.get(f"{url}/v1/mod%0aels/%e2%80%a8?key=secret"),
            lambda: HTTP.post(f"{url}/v1/completions", json={"prompt": "A secret word", "n": 0}),
        ]
    ):
        ask()
        wait_for(lambda done=number + 1: len(access_lines) == done)
    found = [LINE.fullmatch(line) for line in access_lines]
    assert all(found), access_lines
    prompt = len(server.model.tokenizer.encode_chat(HELLO))
    assert [(one["method"], one["status"], one["tokens"]) for one in found if one] == [
        ("POST", "200", f"{prompt}+3"),
        ("POST", "200", f"{prompt}+4"),
        ("GET", "404", "-"),
        ("POST", "400", "-"),
    ]
    assert "secret" not in "".join(access_lines)


def test_health_of_a_dead_engine(start: Callable[..., Running], tiny_model: LanguageModel) -> None:
    engine = make_engine(tiny_model)
    server = start(engine=engine)
    engine.close()
    got = HTTP.get(f"{server.url}/health")
    assert (got.status_code, got.json()) == (503, {"status": "failed"})
    with pytest.raises(openai.InternalServerError) as caught:
        server.client.chat.completions.create(**CHAT)
    assert (caught.value.status_code, caught.value.code) == (503, "closing")
