"""`scripts/replay_trace.py`: traces, their replay against the tiny server, and what it tells."""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.errors import InputError
from tests.wavejax.server.conftest import Running

SCRIPTS = Path(__file__).parents[3] / "scripts"
RANGES = {"document_tokens": (50, 60), "question_tokens": (3, 9), "answer_tokens": (2, 6)}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import replay_trace  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(SCRIPTS))
    return replay_trace


def test_a_trace_is_of_its_seed(script: ModuleType, tmp_path: Path) -> None:
    make = script.make_trace
    trace = make(400, 8.0, 3, **RANGES, seed=1)
    assert trace == make(400, 8.0, 3, **RANGES, seed=1)
    assert trace != make(400, 8.0, 3, **RANGES, seed=2)
    times = np.asarray([one.arrival_s for one in trace])
    assert (np.diff(times) >= 0).all()
    assert times[-1] / 400 == pytest.approx(1 / 8, rel=0.2)
    assert {one.document for one in trace} == {0, 1, 2}
    for number in range(3):
        assert len({one.document_tokens for one in trace if one.document == number}) == 1
    for name, (least, most) in RANGES.items():
        found = {getattr(one, name) for one in trace}
        assert least <= min(found) <= max(found) <= most
    assert {one.question_tokens for one in trace} == set(range(3, 10))
    script.write_trace(tmp_path / "t.jsonl", trace)
    assert script.read_trace(tmp_path / "t.jsonl") == trace


def test_prompts_of_one_document_begin_alike(script: ModuleType) -> None:
    trace, words = script.make_trace(30, 1.0, 2, **RANGES, seed=0), np.arange(7, 99)
    trace += [dataclasses.replace(one, document=None) for one in trace[:2]]
    prompts = [script.prompt_of(trace, number, words, 5) for number in range(len(trace))]
    begun = [tuple(p[: one.document_tokens]) for one, p in zip(trace, prompts, strict=True)]
    assert len(set(begun)) == 2 + 2
    for one, prompt in zip(trace, prompts, strict=True):
        assert len(prompt) == one.document_tokens + one.question_tokens
        assert set(prompt) <= set(words.tolist())
    rest = [tuple(p[one.document_tokens :]) for one, p in zip(trace, prompts, strict=True)]
    assert len(set(rest)) == len(trace)


def line_of(*numbers: float, **more: object) -> str:
    """A trace's line of anything."""
    names = ("arrival_s", "document_tokens", "question_tokens", "answer_tokens")
    return json.dumps(dict(zip(names, numbers, strict=True)) | more)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{}", "line 2 is no request"),
        ("[1]", "line 2 is no request"),
        (line_of(-1, 0, 1, 1), "arrival_s is -1"),
        (line_of(0, 0, 0, 1), "at least one token each"),
        (line_of(0, 1.5, 1, 1), "must be whole"),
        (line_of(0, 1, 1, 1, document="a"), "document is 'a'"),
    ],
)
def test_lines_that_are_none(script: ModuleType, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "t").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=words):
        script.read_trace(tmp_path / "t")


def test_sums(script: ModuleType) -> None:
    done = {"prompt_tokens": 10, "completion_tokens": 4, "total_s": 2.0}
    results = [
        {**done, "sent_s": 1.0, "first_token_s": 0.5, "gaps_s": [0.1, 0.3], "cached_tokens": 0},
        {**done, "sent_s": 3.0, "first_token_s": 0.1, "gaps_s": [0.2], "cached_tokens": 8},
        {"sent_s": 2.0, "total_s": 1.0, "error": "full"},
    ]
    found = script.summary(results)
    assert list(found) == ["all", "reused", "read"]
    every = found["all"]
    assert (every["requests"], every["failed"]) == (3, 1)
    assert every["first_token_median_s"] == pytest.approx(0.3)
    assert every["gap_median_s"] == pytest.approx(0.2)
    assert every["gap_longest_s"] == pytest.approx(0.3)
    assert every["answer_tokens_per_s"] == pytest.approx(8 / 4)  # from 1 s to 5 s
    assert found["reused"]["first_token_median_s"] == pytest.approx(0.1)
    assert script.summary(results[2:])["all"]["gap_99_s"] is None


def test_a_replay(
    script: ModuleType, server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    made = "--requests 6 --rate 50 --documents 2 --document-tokens 50:60 --answer-tokens 2:6"
    files = {name: tmp_path / name for name in ("trace.jsonl", "found.json", "load.png")}
    options = ["--url", server.url, *made.split(), "--question-tokens", "3:9", "--out"]
    options += [str(files["found.json"]), "--save-trace", str(files["trace.jsonl"])]
    assert script.main([*options, "--plot", str(files["load.png"])]) == 0
    report = json.loads(files["found.json"].read_text())
    trace = script.read_trace(files["trace.jsonl"])
    assert len(report["results"]) == len(trace) == 6
    for one in report["results"]:
        assert one["prompt_tokens"] == one["document_tokens"] + one["question_tokens"]
        assert one["completion_tokens"] == one["answer_tokens"]
        assert len(one["gaps_s"]) < one["answer_tokens"]
        assert 0 < one["first_token_s"] <= one["total_s"]
        assert one["sent_s"] >= one["arrival_s"]
    assert files["load.png"].read_bytes().startswith(b"\x89PNG")
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert "first token" in head
    assert line.split()[:3] == ["all", "6", "0"]
    # The same trace, by its file.
    assert script.main(["--url", server.url, "--trace", str(files["trace.jsonl"])]) == 0


def test_what_fails_is_told(
    script: ModuleType, server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [script.Arrival(0.0, 0, 5, 3), script.Arrival(0.0, 600, 5, 3)]
    script.write_trace(tmp_path / "t", trace)
    assert script.main(["--url", server.url, "--trace", str(tmp_path / "t")]) == 1
    out = capsys.readouterr().out
    assert "1 failed: the prompt has 605 tokens" in " ".join(out.split())
    assert script.main(["--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(
    script: ModuleType,
    server: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask, answered = script.ask, []

    async def stopping(of: Any, one: Any, prompt: Any, start: float) -> Any:
        if one.question_tokens == 6:
            while len(answered) < 2:
                await asyncio.sleep(0.01)
            raise KeyboardInterrupt
        result = await ask(of, one, prompt, start)
        answered.append(result)
        return result

    trace = [script.Arrival(0.0, 0, tokens, 2) for tokens in (5, 5, 6)]
    script.write_trace(tmp_path / "t", trace)
    monkeypatch.setattr(script, "ask", stopping)
    out = tmp_path / "found.json"
    options = ["--url", server.url, "--trace", str(tmp_path / "t"), "--out", str(out)]
    assert script.main(options) == 130
    assert not out.exists()
    kept = json.loads((tmp_path / "found.unfinished.json").read_text())
    assert kept["results"] == answered
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["all", "2", "0"]
