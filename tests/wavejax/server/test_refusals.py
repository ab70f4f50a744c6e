"""What is refused: each in OpenAI's form, with the field, and what to do; nothing is cut."""

import json
from typing import Any

import openai
import pytest

from tests.wavejax.server.conftest import CONTEXT, HTTP, NAME, Running

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/tokenize"
LONG = "x" * 600

CASES: dict[str, tuple[str, dict[str, Any], str | None, list[str]]] = {
    "no messages": (CHAT, {"messages": []}, "messages", ["empty"]),
    "messages missing": (CHAT, {"messages": None}, "messages", ["list"]),
    "no user": (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, None, ["user"]),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        None,
        ["only texts"],
    ),
    "a message of no role": (CHAT, {"messages": [{"content": "x"}]}, None, ["role"]),
    "temperature": (CHAT, {"temperature": -1}, "temperature", ["-1", "1e-6 to 1e6"]),
    "temperature of text": (CHAT, {"temperature": "hot"}, "temperature", ["number"]),
    "top_p": (TEXT, {"top_p": 0}, "top_p", ["above 0"]),
    "top_k": (TEXT, {"top_k": 1.5}, "top_k", ["integer"]),
    "penalty": (CHAT, {"presence_penalty": 3}, "presence_penalty", ["-2 to 2"]),
    "a large top_k": (TEXT, {"top_k": 10**30}, "top_k", [str(2**31 - 1)]),
    "many stops": (TEXT, {"stop": ["x"] * 65}, "stop", ["64"]),
    "seed": (CHAT, {"seed": 2**40}, "seed", [str(2**40), str(2**31 - 1)]),
    "n": (CHAT, {"n": 0}, "n", ["1"]),
    "n of one answer": (CHAT, {"n": 2, "temperature": 0}, "n", ["same answer"]),
    "max_tokens": (CHAT, {"max_tokens": 0}, "max_tokens", ["1"]),
    "empty stop": (CHAT, {"stop": ["a", ""]}, "stop", ["empty"]),
    "unknown stop token": (CHAT, {"stop_token_ids": [9999]}, "stop_token_ids", ["9999", "259"]),
    "top_logprobs alone": (CHAT, {"top_logprobs": 2}, "top_logprobs", ["set `logprobs`"]),
    "too many logprobs": (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20"]),
    "stream_options alone": (
        CHAT,
        {"stream_options": {"include_usage": True}},
        "stream_options",
        ["set `stream`"],
    ),
    "logit_bias": (CHAT, {"logit_bias": {"5": 1}}, "logit_bias", ["not supported"]),
    "tools": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools",
        ["not supported"],
    ),
    "an unknown field": (CHAT, {"max_token": 5}, "max_token", ["not supported"]),
    "echo with logprobs": (TEXT, {"echo": True, "logprobs": 1}, "echo", ["log-prob"]),
    "suffix": (TEXT, {"suffix": "x"}, "suffix", ["not supported"]),
    "best_of": (TEXT, {"best_of": 3}, "best_of", ["not supported"]),
    "no prompts": (TEXT, {"prompt": []}, "prompt", ["0 prompts"]),
    "an unknown token": (TEXT, {"prompt": [5, 260]}, "prompt", ["260", "0 to 259"]),
    "a negative token": (TEXT, {"prompt": [-5]}, "prompt", ["greater than or equal to 0"]),
    "a prompt of numbers": (TEXT, {"prompt": 5}, "prompt", []),
    "long conversation": (
        CHAT,
        {"messages": [{"role": "user", "content": LONG}], "max_completion_tokens": 5},
        "messages",
        [str(CONTEXT), "608", "603"],
    ),
    "long conversation, no maximum": (
        CHAT,
        {"messages": [{"role": "user", "content": LONG}]},
        "messages",
        [str(CONTEXT), "603"],
    ),
    "long text": (TEXT, {"prompt": LONG, "max_tokens": 7}, "prompt", [str(CONTEXT), "601", "608"]),
    "long answer": (TEXT, {"prompt": "x", "max_tokens": 600}, "prompt", [str(CONTEXT), "602"]),
    "longer than allowed": (TEXT, {"max_tokens": 65}, "max_tokens", ["65", "64"]),
    "longer than allowed, chat": (CHAT, {"max_tokens": 65}, "max_tokens", ["65", "64"]),
    "text and messages": (TOKENS, {"prompt": "x", "messages": HELLO}, "prompt", ["one of them"]),
    "neither": (TOKENS, {"prompt": None}, "prompt", ["one of them"]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies(server: Running, name: str, stream: bool) -> None:
    """A stream is refused as a whole is: by the status, before it begins."""
    path, wrong, param, words = CASES[name]
    body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    if stream and path != TOKENS and "stream_options" not in wrong:
        body["stream"] = True  # type: ignore[assignment]
    before = server.service.engine.stats().submitted
    got = HTTP.post(server.url + path, json={"model": NAME, **body, **wrong})
    error = got.json()["error"]
    assert (got.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    assert "\n" not in error["message"]
    assert server.service.engine.stats().submitted == before


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, b'{"messages": [{"role": "user", "content": "a\\ud800"}]}'),
        (TEXT, b'{"prompt": "a\\udc00"}'),
        (TEXT, b'{"prompt": "a", "stop": "\\ud800"}'),
        (TEXT, b'{"prompt": "a", "\\ud800": 1}'),
        (TEXT, b'{"prompt": "a", "model": "\\ud800"}'),
        (TOKENS, b'{"prompt": "a\\ud800"}'),
    ],
)
def test_halves_of_characters(server: Running, path: str, body: bytes) -> None:
    """JSON can spell them, UTF-8 cannot; nor can the answer."""
    got = HTTP.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
    assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")


def test_long_values_are_not_sent_back(server: Running) -> None:
    got = HTTP.post(server.url + TEXT, json={"prompt": "x", "model": "m" * 10_000})
    assert got.status_code == 404
    assert len(got.content) < 1000


def test_an_overflow_has_openais_code(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model=NAME, prompt=LONG)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, TEXT, TOKENS])
def test_another_model(server: Running, path: str) -> None:
    body = {"model": "gpt-9", "messages": HELLO} if path == CHAT else {"prompt": "x"}
    got = HTTP.post(server.url + path, json={**body, "model": "gpt-9"})
    error = got.json()["error"]
    assert (got.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'gpt-9'" in error["message"]
    assert f"'{NAME}'" in error["message"]


def test_embeddings(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as caught:
        server.client.embeddings.create(model=NAME, input="x")
    assert caught.value.code == "unsupported_endpoint"


@pytest.mark.parametrize(
    "content, kind, words",
    [
        (b"{", "application/json", ["no JSON"]),
        (b"", "application/json", ["JSON object"]),
        (b"[1]", "application/json", ["JSON object"]),
        (b"\xff\xfe", "application/json", ["body"]),
        (b'{"prompt": "x", "temperature": NaN}', "application/json", ["temperature"]),
        (b"[" * 100_000, "application/json", ["body"]),
        # What any page in a browser could send to this machine, unasked.
        (json.dumps({"prompt": "x"}).encode(), "text/plain", ["application/json"]),
    ],
)
def test_bodies_that_are_no_json(
    server: Running, content: bytes, kind: str, words: list[str]
) -> None:
    got = HTTP.post(server.url + TEXT, content=content, headers={"Content-Type": kind})
    error = got.json()["error"]
    assert (got.status_code, error["type"]) == (400, "invalid_request_error")
    for word in words:
        assert word in error["message"], error


def test_paths_and_methods(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
    ):
        got = HTTP.request(method, server.url + path)
        assert got.status_code == status
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
