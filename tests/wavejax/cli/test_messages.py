"""Conversations: --messages, --system, --template-arg, and what is wrong with them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from models.text.tokenizer import load_tokenizer
from tests.wavejax.cli.conftest import Result, write_tokenizer
from wavejax.cli.encoding import encode_prompts
from wavejax.cli.prompts import parse_template_args, read_conversations

Generate = Callable[..., Result]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Größe?"},
]
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if loud %}!{{ loud }}!{% endif %}<answer>"
)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_params(*_: object) -> None:
        raise AssertionError("the weights were read before the input was checked")

    monkeypatch.setattr(Checkpoint, "load_params", load_params)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, chat_template=TEMPLATE)
    return load_tokenizer(folder)


def written(tmp_path: Path, content: object, name: str = "messages.json") -> str:
    file = tmp_path / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def encoded(tokenizer: Any, **given: Any) -> tuple[list[str], bool]:
    """The texts that the model would read, but for control tokens; and whether they are raw."""
    options = {"prompts": (), "prompt_files": (), "message_files": (), "template_args": ()}
    options |= {"chat": None, "system": None, "control_tokens": False}
    ids, raw = encode_prompts(tokenizer, **(options | given))
    return [tokenizer.decode(prompt) for prompt in ids], raw


def test_every_turn_reaches_the_model(tokenizer: Any, tmp_path: Path) -> None:
    one = written(tmp_path, TURNS)
    other = written(tmp_path, TURNS[1:2], "other.json")
    texts, raw = encoded(tokenizer, message_files=(one, other))
    assert texts == ["sBe brief.uHelloaHiuGröße?", "uHello"]
    assert not raw


def test_a_system_message_opens_each_prompt_and_conversation(
    tokenizer: Any, tmp_path: Path
) -> None:
    assert encoded(tokenizer, prompts=("a", "b"), system="S")[0] == ["sSua", "sSub"]
    assert encoded(tokenizer, prompts=("a",), system="")[0] == ["sua"]
    turns = written(tmp_path, TURNS[1:])
    assert encoded(tokenizer, message_files=(turns,), system="S")[0] == ["sSuHelloaHiuGröße?"]
    with pytest.raises(InputError, match="`system` is given, and the messages begin with a system"):
        encoded(tokenizer, message_files=(written(tmp_path, TURNS),), system="S")


def test_template_arguments_reach_the_template(tokenizer: Any) -> None:
    texts, _ = encoded(tokenizer, prompts=("a",), template_args=("loud=yes",))
    assert texts == ["ua!yes!"]
    # JSON's false, not a text, which would count as true.
    assert encoded(tokenizer, prompts=("a",), template_args=("loud=false",))[0] == ["ua"]


def test_values_of_template_arguments() -> None:
    pairs = ["a=false", "b=3", 'c="3"', "d=[1, 2]", "e=some text", "f=", "g=x=y", "h=null"]
    assert parse_template_args(pairs) == {
        "a": False, "b": 3, "c": "3", "d": [1, 2], "e": "some text", "f": "", "g": "x=y", "h": None,
    }  # fmt: skip
    for pair in ("a", "=1", "a b=1", ""):
        with pytest.raises(InputError, match="give KEY=VALUE"):
            parse_template_args([pair])
    with pytest.raises(InputError, match="--template-arg a is given twice"):
        parse_template_args(["a=1", "a=2"])


def test_control_tokens_of_a_text_count_only_if_allowed(tokenizer: Any, tmp_path: Path) -> None:
    text = "ends</s>here"
    end = tokenizer.backend.token_to_id("</s>")
    turns = written(tmp_path, [{"role": "user", "content": text}])
    for given in ({"prompts": (text,)}, {"prompts": (text,), "chat": False},
                  {"message_files": (turns,)}):  # fmt: skip
        options: dict[str, Any] = {"prompts": (), "prompt_files": (), "message_files": ()}
        options |= {"template_args": (), "chat": None, "system": None} | given
        for allowed in (False, True):
            (ids,), _ = encode_prompts(tokenizer, **options, control_tokens=allowed)
            assert (end in ids) == allowed


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps(TURNS, ensure_ascii=False).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_conversations(["-"]) == [TURNS]
    with pytest.raises(InputError, match="can be only one of the message files"):
        read_conversations(["-", "-"])


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("", "is empty"),
        ('["\\ud800"]', "is not JSON"),
        ("{}", "holds a JSON dict"),
        ("[]", "holds an empty list"),
        ('"hello"', "holds a JSON str"),
        (["hello"], "message 1 is a JSON str"),
        ([MESSAGE, {"content": "x"}], "message 2 has no role"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "has a content that is a JSON NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a content that is a JSON list"),
        ([{"role": 1, "content": "x"}], "has a role that is a JSON int"),
        ([{"role": "User", "content": "x"}], "message 1 has the role 'User'"),
        ([MESSAGE | {"name": "me"}], "has 'name' besides role and content"),
        ([MESSAGE, {"role": "assistant", "content": "x"}], "ends with a message of role assistant"),
        ([{"role": "system", "content": "x"}], "ends with a message of role system"),
        ([{"role": "user", "content": " \n"}], "the last message is empty"),
    ],
)
def test_files_of_another_shape(
    generate: Generate, tiny: Path, tmp_path: Path, no_weights: None, content: object, said: str
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    result = generate("--model", tiny, "--messages", file)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"error: {file}")
    assert said in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--messages", "absent.json"), "cannot read message file absent.json: No such file"),
        (("--messages", "a", "--prompt", "x"), "give --messages or a prompt, not both"),
        (("--messages", "a", "--prompt-file", "x"), "give --messages or a prompt, not both"),
        (("--messages", "a", "--raw"), "--messages is for chat"),
        (("--prompt", "x", "--raw", "--system", "S"), "--system is for chat"),
        (("--prompt", "x", "--raw", "--template-arg", "a=1"), "--template-arg is for chat"),
        (("--plan", "--context", 9, "--messages", "a"), "not both"),
        (("--prompt", "x", "--template-arg", "a"), "give KEY=VALUE"),
    ],
)
def test_options_that_make_no_sense(
    generate: Generate, tiny: Path, no_weights: None, arguments: tuple, said: str
) -> None:
    result = generate("--model", tiny, *arguments)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_chat_options_for_a_model_without_chat(
    generate: Generate, tiny: Path, tmp_path: Path, no_weights: None
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    write_tokenizer(model)
    for arguments in (("--prompt", "x", "--system", "S"), ("--messages", written(tmp_path, TURNS))):
        result = generate("--model", model, *arguments)
        assert result.status == 2
        assert "no chat template" in result.err
