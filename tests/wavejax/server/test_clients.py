"""Other clients that users have: a stream read with httpx, and curl."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.wavejax.server.conftest import HTTP, NAME, Running

BODY: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": 12,
    "stream": True,
}


def text_of(lines: list[str]) -> str:
    """The text of a stream's lines; each event is one line of data, and an empty one after it."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(one) for one in data[:-1]]
    return "".join(choice["delta"].get("content", "") for c in chunks for choice in c["choices"])


def expected(server: Running) -> str:
    return server.model.generate(BODY["messages"], max_new_tokens=12).text


def test_httpx(server: Running) -> None:
    with HTTP.stream("POST", f"{server.url}/v1/chat/completions", json=BODY) as got:
        assert got.status_code == 200
        assert got.headers["content-type"].startswith("text/event-stream")
        assert got.headers["cache-control"] == "no-store"
        lines = list(got.iter_lines())
    assert text_of(lines) == expected(server)
    assert all(line == "" or line.startswith("data: ") for line in lines)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Running) -> None:
    command = ["curl", "--silent", "--no-buffer", f"{server.url}/v1/chat/completions"]
    command += ["--header", "Content-Type: application/json", "--data", json.dumps(BODY)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert text_of(done.stdout.decode().split("\n")) == expected(server)
    done = subprocess.run(["curl", "-s", f"{server.url}/health"], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"status": "ok"}


def test_characters_that_some_clients_end_lines_at(server: Running) -> None:
    """Events are ASCII: U+2028 or U+0085 within a text ends no line."""
    text = "a\u2028b\u0085c\x1cd"
    body = BODY | {"messages": None, "prompt": text, "echo": True}
    body.pop("messages")
    with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as got:
        lines = list(got.iter_lines())
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(text)


def test_the_pages_example(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs/server.md").read_text(encoding="utf-8")
    # The next one asks a document: test_documents.py runs it.
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("http://localhost:8000", server.url)
    exec(compile(code, "docs/server.md", "exec"), {})
    assert capsys.readouterr().out
