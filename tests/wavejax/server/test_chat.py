"""Chat completions by OpenAI's own client: the model's answers, and every field of them."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from models.decoder import unembed
from models.text.tokenizer import Tokenizer
from tests.wavejax.server.conftest import NAME, Running
from wavejax import LanguageModel, Sampler

TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
GREEDY: Any = {"model": NAME, "messages": TALK, "temperature": 0}


def texts_of(chunks: Iterable[ChatCompletionChunk], n: int = 1) -> list[str]:
    """The text of each choice of a stream."""
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


def test_an_answer(server: Running) -> None:
    got = server.client.chat.completions.create(**GREEDY, max_completion_tokens=12)
    expected = server.model.generate(TALK, max_new_tokens=12)
    assert len(got.choices) == 1
    choice = got.choices[0]
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (got.object, got.model) == ("chat.completion", NAME)
    assert got.id.startswith("chatcmpl-")
    assert got.created >= server.service.created
    usage = got.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, 12)
    assert usage.total_tokens == expected.prompt_tokens + 12
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_same_answer(server: Running) -> None:
    expected = server.model.generate(TALK, max_new_tokens=12)
    options: Any = {"include_usage": True}
    chunks = list(
        server.client.chat.completions.create(
            **GREEDY, max_tokens=12, stream=True, stream_options=options
        )
    )
    assert texts_of(chunks) == [expected.text]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, usage = chunks
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    assert all(part.usage is None for part in parts)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    assert usage.usage.prompt_tokens == expected.prompt_tokens


def test_progress_is_told_if_asked_for(server: Running) -> None:
    options: Any = {"include_progress": True}
    chunks = list(
        server.client.chat.completions.create(
            **GREEDY, max_tokens=2, stream=True, stream_options=options
        )
    )
    told = [chunk.model_extra["progress"] for chunk in chunks if not chunk.choices]  # type: ignore[index]
    assert told
    total = server.model.generate(TALK, max_new_tokens=1).prompt_tokens
    read = [one["read_tokens"] for one in told]
    assert {one["prompt_tokens"] for one in told} == {total}
    assert read == sorted(read)
    assert read[-1] == total


@pytest.mark.parametrize("stream", [False, True])
def test_samples_and_seed(server: Running, stream: bool) -> None:
    """Samples of one prompt are those of a batch with this seed."""
    sampler = Sampler(temperature=0.9, top_p=0.95, presence_penalty=0.5)
    expected = server.model.generate(TALK, 10, sampler=sampler, seed=7, samples=3)
    asked: Any = {
        "model": NAME,
        "messages": TALK,
        "temperature": 0.9,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "seed": 7,
        "n": 3,
        "max_tokens": 10,
    }
    got: Any = server.client.chat.completions.create(**asked, stream=stream)
    if stream:
        texts = texts_of(got, 3)
    else:
        texts = [choice.message.content for choice in got.choices]
        tokens = sum(len(answer.token_ids) for answer in expected.answers)
        assert got.usage.completion_tokens == tokens
        assert got.usage.prompt_tokens == expected.prompt_tokens
    assert texts == [answer.text for answer in expected.answers]
    assert len(set(texts)) == 3


def test_sampling_that_others_have(server: Running) -> None:
    """What vLLM's clients give in the body: top_k and the like."""
    sampler = Sampler(
        temperature=1.1, top_k=20, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3
    )
    expected = server.model.generate(TALK, 10, sampler=sampler, seed=-3)
    got = server.client.chat.completions.create(
        model=NAME,
        messages=TALK,
        temperature=1.1,
        frequency_penalty=0.3,
        seed=-3,
        max_tokens=10,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
    )
    assert got.choices[0].message.content == expected.text


def test_without_a_seed_answers_differ(server: Running) -> None:
    """And without a temperature: it is then 1, as OpenAI has it."""
    asked: Any = {"model": NAME, "messages": TALK, "max_tokens": 24}
    found = {
        server.client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)
    }
    assert len(found) == 3


def test_stop_strings(server: Running) -> None:
    whole = server.model.generate(TALK, max_new_tokens=24).text
    place = next(
        place for place in range(4, len(whole) - 2) if whole.find(whole[place:][:2]) == place
    )
    stop = whole[place : place + 2]
    for given in (stop, ["nowhere", stop]):
        got = server.client.chat.completions.create(**GREEDY, max_tokens=24, stop=given)
        assert got.choices[0].message.content == whole[:place]
        assert got.choices[0].finish_reason == "stop"


def test_stop_tokens(server: Running) -> None:
    whole = server.model.generate(TALK, max_new_tokens=24)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    got = server.client.chat.completions.create(
        **GREEDY, max_tokens=24, extra_body={"stop_token_ids": [token]}
    )
    assert got.usage is not None
    assert got.usage.completion_tokens == first + 1
    assert got.choices[0].finish_reason == "stop"


def logprobs_of(model: LanguageModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Of every token of the vocabulary, before each of the answer's: `[answer, vocab]` float64."""
    module, variables = model.flax()
    tokens = jnp.asarray([prompt + answer])
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = jax.jit(module.apply)(variables, tokens, positions, None)
    logits = unembed(module.config, variables, hidden)
    logits = np.asarray(logits, np.float64)[0, len(prompt) - 1 : -1]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Running, stream: bool) -> None:
    """Of the model itself, whatever the temperature is."""
    tokenizer = server.model.tokenizer
    sampler = Sampler(temperature=1.7)
    answer = list(server.model.generate(TALK, 6, sampler=sampler, seed=2).token_ids)
    expected = logprobs_of(server.model, tokenizer.encode_chat(TALK), answer)
    asked: Any = {"model": NAME, "messages": TALK, "temperature": 1.7, "seed": 2, "max_tokens": 6}
    got: Any = server.client.chat.completions.create(
        **asked, logprobs=True, top_logprobs=4, stream=stream
    )
    choices = [choice for chunk in got for choice in chunk.choices] if stream else got.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == len(answer)
    named_by = byte_of_token(tokenizer)
    for entry, token, row in zip(entries, answer, expected, strict=True):
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
        best = np.argsort(-row)[:4]
        np.testing.assert_allclose(
            [top.logprob for top in entry.top_logprobs], row[best], atol=1e-4
        )
        # A token of this model is a byte, or the end.
        named = [bytes(top.bytes) for top in entry.top_logprobs]
        assert named == [named_by[int(index)] for index in best]
        assert bytes(entry.bytes) == named_by[token]


@functools.cache
def byte_of_token(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The byte that each token of the tiny model is: by encoding characters that have them all."""
    codes = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)]
    text = "".join(map(chr, codes))
    ids = tokenizer.encode(text, add_special=False)
    found = {token: byte.to_bytes() for token, byte in zip(ids, text.encode(), strict=True)}
    # UTF-8 has no such bytes.
    for byte in (0xC0, 0xC1, *range(0xF5, 0x100)):
        found[tokenizer.backend.token_to_id(chr(byte))] = byte.to_bytes()
    for token, text in enumerate(["<s>", "</s>", "<user>", "<answer>"]):
        found[token] = text.encode()
    assert len(found) == tokenizer.vocab_size
    return found


def test_ways_to_write_messages(server: Running) -> None:
    """Text parts, and OpenAI's newer name of the system."""
    ways: list[Any] = [
        TALK,
        [{"role": "developer", "content": "Be brief."}, TALK[1]],
        [TALK[0], {"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    ]
    answers = {
        server.client.chat.completions.create(model=NAME, messages=way, temperature=0, max_tokens=6)
        .choices[0]
        .message.content
        for way in ways
    }
    assert answers == {server.model.generate(TALK, max_new_tokens=6).text}


def test_variables_of_the_template(server: Running) -> None:
    """The template takes them; this one has none, which is said."""
    with pytest.raises(openai.BadRequestError, match="no variable enable_thinking"):
        server.client.chat.completions.create(
            **GREEDY, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        )


def test_fields_without_effect(server: Running) -> None:
    got = server.client.chat.completions.create(
        **GREEDY,
        max_tokens=6,
        user="someone",
        metadata={"a": "b"},
        store=False,
        tool_choice="none",
        parallel_tool_calls=False,
        response_format={"type": "text"},
        logit_bias={},
        modalities=["text"],
    )
    assert got.choices[0].message.content == server.model.generate(TALK, max_new_tokens=6).text


def test_without_a_maximum_it_is_the_servers(server: Running) -> None:
    got = server.client.chat.completions.create(**GREEDY)
    assert got.usage is not None
    assert got.usage.completion_tokens <= server.service.limits.new_tokens
    stopped = got.choices[0].finish_reason == "stop"
    assert stopped or got.usage.completion_tokens == server.service.limits.new_tokens
