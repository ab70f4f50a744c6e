"""Responses, and answers of a form, by OpenAI's own client."""

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.wavejax.server.conftest import NAME, Running

TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
GREEDY: Any = {"model": NAME, "temperature": 0, "max_output_tokens": 10}
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_a_response(server: Running) -> None:
    expected = server.model.generate(TALK, max_new_tokens=10)
    for asked in (
        {"instructions": "Be brief.", "input": "Hello"},
        {"input": TALK},
        {
            "instructions": "Be brief.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        },
    ):
        got = server.client.responses.create(**GREEDY, **asked)  # type: ignore[call-overload]
        assert got.output_text == expected.text
        assert (got.object, got.model, got.status) == ("response", NAME, "incomplete")
        assert got.incomplete_details.reason == "max_output_tokens"
        assert got.usage.input_tokens == expected.prompt_tokens
        assert got.usage.output_tokens == 10
        assert got.usage.input_tokens_details.cached_tokens == 0


def test_events(server: Running) -> None:
    expected = server.model.generate(TALK, max_new_tokens=10)
    events = list(server.client.responses.create(**GREEDY, input=TALK, stream=True))
    kinds = [event.type for event in events]
    head = ["response.created", "response.in_progress", "response.output_item.added"]
    head += ["response.content_part.added"]
    tail = ["response.output_text.done", "response.content_part.done"]
    tail += ["response.output_item.done", "response.incomplete"]
    assert (kinds[:4], kinds[-4:]) == (head, tail)
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Response = events[-1].response  # type: ignore[union-attr]
    assert last.output_text == expected.text
    assert last.usage is not None
    assert last.usage.output_tokens == 10
    assert last.id == events[0].response.id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 600}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"background": True}, "background"),
    ],
)
def test_what_is_refused(server: Running, wrong: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.responses.create(**{"model": NAME, "input": "x", **wrong})
    assert caught.value.param == ("input" if param == "max_output_tokens" else param)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_of_a_schema(server: Running, seed: int) -> None:
    """A random model's answer is the JSON that is asked for, and ends with it."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    got = server.client.chat.completions.create(
        model=NAME, messages=TALK, n=2, seed=seed, max_tokens=60, response_format=form
    )
    for choice in got.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert set(found) == {"colour", "count"}
        assert found["colour"] in ("red", "green")
        assert found["count"] in range(100)


def test_json_in_a_response(server: Running) -> None:
    form: Any = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    got = server.client.responses.create(
        model=NAME, input=TALK, temperature=0, max_output_tokens=60, text={"format": form}
    )
    assert got.status == "completed"
    assert json.loads(got.output_text)["colour"] in ("red", "green")


def test_any_object(server: Running) -> None:
    """It begins as one, and is one if it ends by itself."""
    got = server.client.chat.completions.create(
        model=NAME, messages=TALK, seed=5, max_tokens=60, response_format={"type": "json_object"}
    )
    text = got.choices[0].message.content or ""
    assert text.startswith("{")
    if got.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "form, words",
    [
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "no `schema`"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}},
            "nope",
        ),
        ({"type": "yaml"}, "json_schema"),
    ],
)
def test_forms_that_are_refused(server: Running, form: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        server.client.chat.completions.create(model=NAME, messages=TALK, response_format=form)
    assert caught.value.param == "response_format"
