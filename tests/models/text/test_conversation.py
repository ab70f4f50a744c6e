"""Conversations in chat templates: nothing is dropped without a word; variables pass through."""

from pathlib import Path
from typing import Any

import pytest

from models.errors import InputError
from models.text.tokenizer import Tokenizer
from tests.support.small_tokenizers import CHATML, byte_level, save

BY_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
BY_PARTS_BUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '!' }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
)
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
CUT_SHORT = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"
COMMANDS = (
    "{% set text = messages[0].content.replace('/no_think', '').rstrip() %}"
    "{{ text }}{% if '/no_think' in messages[0].content %}<think></think>{% endif %}"
)
USER = {"role": "user", "content": "im ab, and a"}
SYSTEM = {"role": "system", "content": "a"}
DOCUMENT = "The code of the door is 904417. " * 50


def load(tmp_path: Path, template: str) -> Tokenizer:
    return save(tmp_path, byte_level(), chat_template=template)


@pytest.mark.parametrize(
    "template, messages, text",
    [
        (BY_PARTS, [USER], "[user]im ab, and a"),
        (BY_PARTS, [SYSTEM, USER], "[system]a[user]im ab, and a"),
        (BY_PARTS_BUT_SYSTEM, [SYSTEM, USER], "a!im ab, and a"),
        (BY_PARTS, [{"role": "user", "content": DOCUMENT}], f"[user]{DOCUMENT}"),
        ("{{ messages[0].content | tojson }}", [{"role": "user", "content": 'a"\n'}], '"a\\"\\n"'),
        ("{{ messages[0].content | trim }}", [{"role": "user", "content": "\n  a b\n"}], "a b"),
        (COMMANDS, [{"role": "user", "content": "im /no_think"}], "im<think></think>"),
        (COMMANDS, [{"role": "user", "content": "/no_think"}], "<think></think>"),
    ],
)
def test_each_message_is_in_the_text(
    tmp_path: Path, template: str, messages: list[dict[str, str]], text: str
) -> None:
    tokenizer = load(tmp_path, template)
    assert tokenizer.chat_text(messages) == text
    assert tokenizer.encode_chat(messages) == tokenizer.encode_chat_text(text)


@pytest.mark.parametrize(
    "template, messages, said",
    [
        # "a" is in the text all the same, in the user's message.
        (WITHOUT_SYSTEM, [SYSTEM, USER], r"message 1 of 2 \(system\).*user's message.*raw=True"),
        (CUT_SHORT, [{"role": "user", "content": DOCUMENT}], r"message 1 of 1 \(user\).*raw=True"),
        ("a{{ messages[0].role }}", [{"role": "user", "content": "a"}], "leaves out message 1"),
        ("{{ messages[1].content }}", [USER, USER], "leaves out message 1"),
        ("{{ messages[0].content | upper }}", [USER], "changes its text"),
        ("{{ raise_exception('no system') }}", [SYSTEM, USER], "no system"),
    ],
)
def test_dropped_messages_are_refused(
    tmp_path: Path, template: str, messages: list[dict[str, str]], said: str
) -> None:
    tokenizer = load(tmp_path, template)
    for read in (tokenizer.chat_text, tokenizer.encode_chat):
        with pytest.raises(InputError, match=said) as caught:
            read(messages)
        assert "\n" not in str(caught.value)


def test_parts_are_read_as_the_text_that_they_make(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "im "}, {"type": "text", "text": "ab, and a"}]
    for template in (CHATML, BY_PARTS):
        tokenizer = load(tmp_path, template)
        expected = tokenizer.encode_chat([USER])
        assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == expected


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "user", "content": 5}, "content is 5; expected a text"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part that is no text"),
        ({"content": "a"}, '1 of 1 is .*expected {"role"'),
        ({"role": None, "content": "a"}, "1 of 1 is .*expected"),
    ],
)
def test_messages_of_a_wrong_kind(tmp_path: Path, message: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, CHATML).encode_chat([message])


def test_template_variables(tmp_path: Path) -> None:
    template = (
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}"
        "<think></think>{% endif %}{{ date_string }}"
    )
    tokenizer = load(tmp_path, template)
    assert tokenizer.chat_text([USER]) == USER["content"]
    args = {"enable_thinking": False, "date_string": "today"}
    text = USER["content"] + "<think></think>today"
    assert tokenizer.chat_text([USER], template_args=args) == text
    assert tokenizer.encode_chat([USER], template_args=args) == tokenizer.encode_chat_text(text)


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "documents",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "raise_exception",
        "range",
    ],
)
def test_variables_that_the_conversation_sets(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is set by the conversation"):
        load(tmp_path, CHATML).encode_chat([USER], template_args={name: "x"})


def test_variables_that_the_template_does_not_read(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CHATML + "{{ enable_thinking }}{{ strftime_now('%%') }}")
    with pytest.raises(InputError, match=r"no variable enable_thinkng; it has: enable_thinking$"):
        tokenizer.encode_chat([USER], template_args={"enable_thinkng": False})
    with pytest.raises(InputError, match=r"it has: none$"):
        load(tmp_path, CHATML).encode_chat([USER], template_args={"enable_thinking": False})


def test_texts_that_hold_characters_of_private_use(tmp_path: Path) -> None:
    """They are what messages are marked with, and no others are then."""
    text = "".join(map(chr, [*range(0x100000, 0x100020), 0xE000, 0xE001])) + "</s>"
    tokenizer = load(tmp_path, CHATML)
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert text in tokenizer.decode(ids)
    assert tokenizer.backend.token_to_id("</s>") not in ids
