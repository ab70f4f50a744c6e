"""A chat's next turn, and `cached_tokens`, where slots are reused; by OpenAI's own client."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.wavejax.server.conftest import NAME, Running, make_engine
from wavejax import LanguageModel
from wavejax.engine.batching import BatchEngine

GREEDY: Any = {"model": NAME, "temperature": 0, "max_tokens": 12}
FIRST = "The bridge over the river Elm was opened in 1907. When was it opened?"


@pytest.fixture(scope="module")
def reusing_engine(tiny_model: LanguageModel) -> Iterator[BatchEngine]:
    with make_engine(tiny_model, reuse_slots=True) as engine:
        yield engine


def ask(server: Running, *texts: str) -> Any:
    """Asks the last one; before it are turns of the user's and the answers to them."""
    roles = ["user", "assistant"] * len(texts)
    talk: Any = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    given: Any = {**GREEDY, "messages": talk}
    return server.client.chat.completions.create(**given, extra_body={"ignore_eos": True})


def test_a_next_turn_reads_no_more_than_its_own_tokens(
    start: Callable[..., Running], server: Running, reusing_engine: BatchEngine
) -> None:
    reusing = start(engine=reusing_engine)
    first = ask(reusing, FIRST)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    turns = FIRST, "In 1907.", "And where?"
    found = [ask(one, *turns) for one in (reusing, server)]
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in found]
    # The template marks the end of a question in another way once there is an answer.
    assert cached == [first.usage.prompt_tokens - 1, 0]
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens
    # By full attention nothing depends on what came before.
    assert found[0].choices[0].message.content == found[1].choices[0].message.content
