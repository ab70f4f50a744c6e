"""Calls are found in answers as real models write them, wherever the text is cut into pieces."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavejax.server.tool_calls import PARSERS, Call, Family, family_of

NAMES = {"get_weather", "get_time"}
OSLO = {"city": "Oslo", "unit": "celsius"}
QUOTES = {"city": 'a "b" {c} </tool> ü', "days": [1, 2.5, None]}


def written(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def hermes(name: str, arguments: object) -> str:
    return f"<tool_call>\n{written(name, arguments)}\n</tool_call>"


WEATHER, TIME = ("get_weather", OSLO), ("get_time", {})
# The family, what the model writes, and what is told: texts, and calls.
CASES: dict[str, tuple[Family, str, list[object]]] = {
    "one": ("hermes", hermes(*WEATHER), [WEATHER]),
    "two": ("hermes", f"{hermes(*WEATHER)}\n{hermes(*TIME)}", [WEATHER, TIME]),
    "text before": ("hermes", f"I look it up.\n\n{hermes(*WEATHER)}", ["I look it up.", WEATHER]),
    "text between": (
        "hermes",
        f"{hermes(*WEATHER)}\nand\n{hermes(*TIME)}\n",
        [WEATHER, "and", TIME],
    ),
    "no call": ("hermes", "x < y, <tool>, and so on \n", ["x < y, <tool>, and so on \n"]),
    "characters": ("hermes", hermes("get_weather", QUOTES), [("get_weather", QUOTES)]),
    "arguments as text": ("hermes", hermes("get_weather", json.dumps(OSLO)), [WEATHER]),
    "no end mark": ("hermes", hermes(*WEATHER).removesuffix("\n</tool_call>"), [WEATHER]),
    "cut short": ("hermes", hermes(*WEATHER)[:30], [hermes(*WEATHER)[:30]]),
    "no JSON": ("hermes", "<tool_call>get_weather()</tool_call>!", None),  # type: ignore[dict-item]
    "another's name": ("hermes", hermes("rm", {}), None),  # type: ignore[dict-item]
    "no object": ("hermes", hermes("get_time", [1]), None),  # type: ignore[dict-item]
    "llama": ("llama", written(*WEATHER, "parameters"), [WEATHER]),
    "llama, white space": ("llama", f"\n {written(*WEATHER, 'parameters')}\n", [WEATHER]),
    "llama, two": (
        "llama",
        f"{written(*WEATHER, 'parameters')}; {written(*TIME, 'parameters')}",
        [WEATHER, TIME],
    ),
    "llama, text": ("llama", 'It is {"name": "get_time"}', ['It is {"name": "get_time"}']),
    "llama, other JSON": ("llama", '{"answer": 4}', ['{"answer": 4}']),
    "llama, more after it": ("llama", f"{written(*TIME)} is it", None),  # type: ignore[dict-item]
    "llama, cut short": ("llama", written(*WEATHER)[:20], [written(*WEATHER)[:20]]),
}


def parse(family: Family, pieces: list[str]) -> list[object]:
    """What is told of an answer: neighbouring texts as one."""
    parser = PARSERS[family](NAMES)
    found: list[object] = []
    for one in [part for piece in pieces for part in parser.push(piece)] + parser.end():
        if isinstance(one, Call):
            found.append((one.name, json.loads(one.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


def expected(name: str) -> list[object]:
    _, text, told = CASES[name]
    return [text] if told is None else told


@pytest.mark.parametrize("name", CASES)
def test_whole_and_character_by_character(name: str) -> None:
    family, text, _ = CASES[name]
    assert parse(family, [text]) == expected(name)
    assert parse(family, list(text)) == expected(name)


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 120)))
def test_however_it_is_cut(name: str, cuts: list[int]) -> None:
    family, text, _ = CASES[name]
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert parse(family, pieces) == expected(name)


def test_text_comes_before_the_answer_ends() -> None:
    hermes_parser, llama_parser = PARSERS["hermes"](NAMES), PARSERS["llama"](NAMES)
    assert hermes_parser.push("It is ") == ["It is"]
    assert hermes_parser.push("four <too") == [" four"]
    assert llama_parser.push(" It is ") == [" It is "]
    assert llama_parser.push("{four}") == ["{four}"]


def test_each_call_has_its_own_id() -> None:
    parser = PARSERS["hermes"](NAMES)
    calls = [one for one in parser.push(hermes(*TIME) + hermes(*TIME)) if isinstance(one, Call)]
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)


def test_whose_template_it_is() -> None:
    assert family_of("... <tool_call>\n{{ call.arguments | tojson }} ...") == "hermes"
    llama = 'Respond in the format {"name": function name, "parameters": dictionary of ...}'
    assert family_of(llama) == "llama"
    assert family_of("<tool_call>\n<function={{ name }}>") is None
    assert family_of("{{ messages }}") is None
    assert family_of(None) is None
