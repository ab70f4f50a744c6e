"""Completions by OpenAI's own client, models and tokens."""

from typing import Any

import numpy as np
import openai
import pytest

from tests.wavejax.server.conftest import CONTEXT, NAME, Running
from tests.wavejax.server.test_chat import TALK, logprobs_of
from wavejax import Sampler

TEXT = "The sea was calm."
GREEDY: Any = {"model": NAME, "temperature": 0}


def test_a_completion(server: Running) -> None:
    got = server.client.completions.create(**GREEDY, prompt=TEXT)
    expected = server.model.generate(TEXT, 16, raw=True)  # 16 is OpenAI's default
    choice = got.choices[0]
    assert (choice.text, choice.index, choice.logprobs) == (expected.text, 0, None)
    assert choice.finish_reason == "length"
    assert got.object == "text_completion"
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.prompt_tokens
    assert got.usage.completion_tokens == 16


def test_prompts_as_tokens_and_several(server: Running) -> None:
    tokens = server.model.tokenizer.encode(TEXT, add_special=True)
    other = "Another text"
    expected = [server.model.generate(text, 6, raw=True).text for text in (TEXT, other)]
    for prompt in (tokens, [tokens], [TEXT, other], [TEXT]):
        got = server.client.completions.create(**GREEDY, prompt=prompt, max_tokens=6)
        several = prompt == [TEXT, other]
        assert [choice.text for choice in got.choices] == expected[: 1 + several]
        assert [choice.index for choice in got.choices] == [0, 1][: 1 + several]


@pytest.mark.parametrize("stream", [False, True])
def test_samples_of_several_prompts(server: Running, stream: bool) -> None:
    """Choice 2 is prompt 1, sample 0; each sample is what the prompt gets alone."""
    sampler, texts = Sampler(temperature=0.8), [TEXT, "x"]
    expected = [
        answer.text
        for text in texts
        for answer in server.model.generate(
            text, 5, raw=True, sampler=sampler, seed=4, samples=2
        ).answers
    ]
    asked: Any = {"model": NAME, "prompt": texts, "n": 2, "seed": 4, "temperature": 0.8}
    got: Any = server.client.completions.create(**asked, max_tokens=5, echo=True, stream=stream)
    found = [""] * 4
    for part in got if stream else [got]:
        for choice in part.choices:
            found[choice.index] += choice.text
    assert found == [
        text + answer for text, answer in zip([TEXT, TEXT, "x", "x"], expected, strict=True)
    ]


def test_logprobs(server: Running) -> None:
    answer = server.model.generate(TEXT, 5, raw=True)
    tokenizer = server.model.tokenizer
    rows = logprobs_of(
        server.model, tokenizer.encode(TEXT, add_special=True), list(answer.token_ids)
    )
    got = server.client.completions.create(**GREEDY, prompt=TEXT, max_tokens=5, logprobs=2)
    told = got.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    assert told.text_offset is not None
    expected = [row[token] for row, token in zip(rows, answer.token_ids, strict=True)]
    np.testing.assert_allclose(told.token_logprobs, expected, atol=1e-4)
    for top, row in zip(told.top_logprobs, rows, strict=True):
        np.testing.assert_allclose(sorted(top.values()), np.sort(row)[-len(top) :], atol=1e-4)
    assert len(told.tokens) == len(told.text_offset) == 5
    assert told.text_offset == sorted(told.text_offset)
    assert all(0 <= offset <= len(answer.text) for offset in told.text_offset)


def test_a_stream_has_usage_at_its_end(server: Running) -> None:
    chunks = list(
        server.client.completions.create(
            **GREEDY,
            prompt=TEXT,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    expected = server.model.generate(TEXT, 5, raw=True)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 5)  # type: ignore[union-attr]


def test_all_tokens_where_stop_tokens_do_not_count(server: Running) -> None:
    """`ignore_eos`: until the maximum, whatever comes."""
    got = server.client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=60, seed=1, extra_body={"ignore_eos": True}
    )
    assert got.usage is not None
    assert got.usage.completion_tokens == 60
    assert got.choices[0].finish_reason == "length"


def test_models(server: Running) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "wavejax")
    assert model.max_model_len == CONTEXT  # type: ignore[attr-defined]
    assert server.client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="'other'") as caught:
        server.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_tokenize(server: Running) -> None:
    def ask(**body: Any) -> Any:
        return server.client.post("../tokenize", body=body, cast_to=object)

    tokenizer = server.model.tokenizer
    got = ask(model=NAME, prompt="Aé", return_token_strs=True)
    assert got["tokens"] == tokenizer.encode("Aé", add_special=True)
    assert (got["count"], got["max_model_len"]) == (4, CONTEXT)
    assert got["token_strs"] == ["<s>", "A", "\ufffd", "\ufffd"]  # a half of a letter each
    got = ask(prompt="Aé", add_special_tokens=False)
    assert got["tokens"] == tokenizer.encode("Aé", add_special=False)
    assert got["token_strs"] is None
    assert ask(messages=TALK)["tokens"] == tokenizer.encode_chat(TALK)
