"""Chat templates: what they may use, and what becomes of broken ones."""

import pytest

from models.errors import InputError
from models.text.chat import apply_chat

USER = [{"role": "user", "content": "a<b & 'c'"}]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>a<b & 'c'</s>"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}", "x\n"),
        ("{{ messages[0].content | tojson }}", "\"a<b & 'c'\""),
        ("{{ {'é': 1} | tojson }}", '{"é": 1}'),
        ("{{ {'é': 1} | tojson(ensure_ascii=False) }}", '{"é": 1}'),
        ("{{ [2, 1] | tojson(separators=(',', ':')) }}", "[2,1]"),
        (
            "{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}",
            '{\n "a": [\n  2\n ],\n "b": 1\n}',
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}y{% endgeneration %}", "y"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ tools is none }} {{ documents is none }} {{ unknown is defined }}", "True True False"),
        ("{{ messages[0].content.strip().upper() }}", "A<B & 'C'"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert apply_chat(template, USER, bos_token="<s>", eos_token="</s>") == text


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template failed"),
        ("{{ messages[3].content.x }}", "chat template failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% if true %}" * 120 + "{% endif %}" * 120, "too many levels"),
        ("{{ cycler().next() }}", "at least one item"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),
    ],
)
def test_broken_and_hostile_templates(template: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        apply_chat(template, USER)
    assert "\n" not in str(caught.value)
    assert "raw=True" in str(caught.value)
