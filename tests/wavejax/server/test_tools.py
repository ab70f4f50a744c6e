"""Tools and thoughts by OpenAI's own client: answers of given texts, and forced calls."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest

from models.text.tokenizer import Tokenizer
from tests.wavejax.server.conftest import NAME, Running
from wavejax import LanguageModel
from wavejax.engine.batching import BatchEngine, Request
from wavejax.server.service import Limits

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<user>{{ m.content or '' }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
LLAMA = TEMPLATE + '{# {"name": function name, "parameters": dictionary } #}'
THINKS = TEMPLATE + "{# </think> #}"
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time", "description": "What time it is."}},
]
TALK: Any = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"unit": "kelvin"}}\n</tool_call>'


class Script:
    """Allows the tokens of one text alone; see `Constraint`."""

    def __init__(self, tokens: list[int], vocab: int):
        self.left, self.vocab = list(tokens), vocab

    def allowed(self) -> np.ndarray:
        return np.arange(self.vocab) == self.left[0]

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)


class Scripted:
    """An engine whose answers are the text that was set last: what a model would write."""

    def __init__(self, model: LanguageModel, engine: BatchEngine):
        self.model, self.engine, self.text = model, engine, ""
        self.rooms, self.alive, self.stats = engine.rooms, True, engine.stats

    def submit(self, request: Request, on_event: Any = None) -> Any:
        tokens = self.model.tokenizer.encode(self.text, add_special=False)
        script = Script([*tokens, self.model.stop_tokens[0]], self.model.config.vocab_size)
        return self.engine.submit(dataclasses.replace(request, constraint=script), on_event)


Say = Callable[..., Any]


@pytest.fixture(scope="module")
def say(start: Callable[..., Running], tiny_model: LanguageModel, tiny_engine: BatchEngine) -> Say:
    """Asks a server of a template, whose answer is a text."""
    engine, servers = Scripted(tiny_model, tiny_engine), dict[str, Running]()

    def ask(text: str, template: str = TEMPLATE, **given: Any) -> Any:
        if template not in servers:
            servers[template] = start(
                engine=engine, tokenizer=with_template(tiny_model.tokenizer, template), limits=FREE
            )
        engine.text = text
        return servers[template].client.chat.completions.create(
            **{"model": NAME, "messages": TALK, "tools": TOOLS, **given}
        )

    ask.servers = servers  # type: ignore[attr-defined]
    return ask


FREE = Limits(new_tokens=200)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return dataclasses.replace(tokenizer, chat_template=template)


@pytest.fixture(scope="module")
def tools_server(
    start: Callable[..., Running], tiny_model: LanguageModel
) -> Callable[[str], Running]:
    """Servers whose answers are the model's own, by their templates."""
    servers: dict[str, Running] = {}

    def of(template: str) -> Running:
        if template not in servers:
            tokenizer = with_template(tiny_model.tokenizer, template)
            servers[template] = start(tokenizer=tokenizer, limits=FREE)
        return servers[template]

    return of


def joined(chunks: Any) -> tuple[str, str, list[list[str]], str | None]:
    """A stream's thoughts, text, calls (id, name, arguments) and finish reason."""
    thoughts, text, calls, reason = "", "", dict[int, list[str]](), None
    for chunk in chunks:
        [choice] = chunk.choices
        text += choice.delta.content or ""
        thoughts += (choice.delta.model_extra or {}).get("reasoning_content") or ""
        for call in choice.delta.tool_calls or ():
            found = calls.setdefault(call.index, [call.id, call.function.name, ""])
            found[2] += call.function.arguments
        reason = choice.finish_reason or reason
    return thoughts, text, list(calls.values()), reason


def test_a_call_within_an_answer(say: Say) -> None:
    text = f"I look.\n{CALL}\n{CALL.replace('kelvin', 'celsius')}"
    [choice] = say(text).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "weather")
    assert json.loads(first.function.arguments) == {"unit": "kelvin"}
    assert json.loads(second.function.arguments) == {"unit": "celsius"}
    assert first.id != second.id
    _, told, calls, reason = joined(say(text, stream=True))
    assert (told, reason) == ("I look.", "tool_calls")
    assert [call[1:] for call in calls] == [
        ["weather", '{"unit": "kelvin"}'],
        ["weather", '{"unit": "celsius"}'],
    ]


def test_a_call_alone_has_no_content(say: Say) -> None:
    message = say(CALL).choices[0].message
    assert message.content is None
    assert len(message.tool_calls) == 1
    llama = '{"name": "time", "parameters": {}}'
    message = say(llama, LLAMA.replace("<tool_call>", "<call>")).choices[0].message
    assert message.content is None
    assert (message.tool_calls[0].function.name, message.tool_calls[0].function.arguments) == (
        "time",
        "{}",
    )


def test_an_answer_without_a_call(say: Say) -> None:
    for text in ("It is four.", '<tool_call>\n{"name": "rm"}\n</tool_call>'):
        [choice] = say(text).choices
        assert (choice.message.content, choice.finish_reason) == (text, "stop")
        assert choice.message.tool_calls is None
        assert joined(say(text, stream=True)) == ("", text, [], "stop")
    # Where no call may come there is none, whatever the model writes.
    assert say(CALL, tool_choice="none").choices[0].message.content == CALL


def test_a_call_that_is_cut_is_text(say: Say) -> None:
    [choice] = say(CALL, max_tokens=30).choices
    assert (choice.finish_reason, choice.message.content) == ("length", CALL[:30])


def test_thoughts_apart(say: Say) -> None:
    text = "<think>\nTwo and two.\n</think>\n\nFour."
    [choice] = say(text, THINKS).choices
    assert choice.message.content == "Four."
    assert choice.message.model_extra["reasoning_content"] == "Two and two."
    assert joined(say(text, THINKS, stream=True)) == ("Two and two.", "Four.", [], "stop")
    thoughts, told, calls, reason = joined(say(f"<think>Hm</think>{CALL}", THINKS, stream=True))
    assert (thoughts, told, reason) == ("Hm", "", "tool_calls")
    assert calls[0][1] == "weather"
    begun = THINKS.replace("<answer>", "<answer><think>\n")
    assert joined(say("Hm</think>\nSo.", begun, stream=True)) == ("Hm", "So.", [], "stop")
    # A template that knows no thoughts has none.
    assert say(text).choices[0].message.content == text


def test_thoughts_in_a_response(say: Say) -> None:
    say("", THINKS)
    client = say.servers[THINKS].client  # type: ignore[attr-defined]
    for text in ("<think>\nTwo.\n</think>\nFour.", "Four."):
        say(text, THINKS)
        got = client.responses.create(model=NAME, input="Hello")
        events = list(client.responses.create(model=NAME, input="Hello", stream=True))
        assert got.output_text == "Four."
        kinds = [item.type for item in got.output]
        assert kinds == (["reasoning", "message"] if "think" in text else ["message"])
        assert [item.type for item in events[-1].response.output] == kinds
        assert [
            one.item.type for one in events if one.type == "response.output_item.added"
        ] == kinds
        assert [one.item.type for one in events if one.type == "response.output_item.done"] == kinds
        parts = [one for one in events if one.type == "response.output_text.delta"]
        assert "".join(one.delta for one in parts) == "Four."
        assert {one.output_index for one in parts} == {len(kinds) - 1}
        thoughts = [one.delta for one in events if one.type == "response.reasoning_text.delta"]
        assert "".join(thoughts) == ("Two." if "think" in text else "")
        counted = got.usage.output_tokens_details.reasoning_tokens
        assert (counted > 0) == ("think" in text)
        assert counted < got.usage.output_tokens


def test_what_the_template_is_given(say: Say, tiny_model: LanguageModel) -> None:
    """Tools as they were sent, and a call's arguments as an object."""
    talk: Any = [
        *TALK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"unit":"kelvin"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "281"},
    ]
    text = (
        f"<tools>{json.dumps(TOOLS)}<user>Hello<user>"
        '<tool_call>{"unit": "kelvin"}</tool_call><user>281<answer>'
    )
    tokens = tiny_model.tokenizer.encode_chat_text(text)
    assert say("x", messages=talk).usage.prompt_tokens == len(tokens)


@pytest.mark.parametrize("template", [TEMPLATE, LLAMA.replace("<tool_call>", "<call>")])
def test_a_call_that_must_come(tools_server: Callable[[str], Running], template: str) -> None:
    """A random model writes one, of the function and by its schema."""
    client = tools_server(template).client
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for seed in (1, 2):
        given: Any = {"model": NAME, "messages": TALK, "tools": TOOLS, "seed": seed}
        [choice] = client.chat.completions.create(**given, tool_choice=named).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls or ()
        assert json.loads(call.function.arguments)["unit"] in ("celsius", "kelvin")
        _, text, [[_, name, _]], reason = joined(
            client.chat.completions.create(
                **given | {"tools": TOOLS[:1]}, tool_choice="required", stream=True
            )
        )
        assert (text, name, reason) == ("", "weather", "tool_calls")


MARKED: Any = [{"type": "function", "function": {"name": "x", "description": "a<answer>b"}}]
FUNCTION: Any = {"type": "function", "function": {"name": "x"}}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tools": [], "tool_choice": "required"}, "there are no `tools`"),
        ({"tool_choice": FUNCTION}, "names 'x', which `tools` has not"),
        ({"tools": [FUNCTION, FUNCTION]}, "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": MARKED}, "the tools spell a control token"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"messages": [{"role": "user", "tool_calls": [{}], "content": "x"}]}, "`tool_calls` has"),
        ({"extra_body": {"document": "d"}}, "leave `tools` or `document` out"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "is a call or has a form",
        ),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "leaves JSON no end"),
    ],
)
def test_what_is_refused(say: Say, given: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        say("x", **given)
