"""GGUF files whose tokenizers are unknown, damaged or cut off: what is said of them."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from models.errors import InputError
from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import finish, train, write_gguf, write_sentencepiece


@pytest.mark.parametrize(
    "model, pre, said",
    [
        ("gpt2", "falcon", "'falcon'.*tokenizer.json.*llama-bpe.*qwen2.*smollm"),
        ("t5", None, "'t5'.*gpt2, llama"),
    ],
)
def test_unknown_kinds_are_named(tmp_path: Path, model: str, pre: str | None, said: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", train("gpt-2"), model, pre)
    with pytest.raises(InputError, match=said):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "unknown"])
@pytest.mark.parametrize("value", ["2", [2], 2.0, -1, True])
def test_token_ids_that_are_no_ids(tmp_path: Path, name: str, value: Any) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", **{f"{name}_token_id": value})
    with pytest.raises(InputError, match=rf"ggml\.{name}_token_id is .*; expected a token id") as e:
        load_tokenizer(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("token_type", 5, "expected an array"),
        ("token_type", "x", "expected an array"),
        ("merges", "x", "expected an array"),
        ("pre", [1], "expected a text"),
    ],
)
def test_values_of_a_wrong_kind(tmp_path: Path, name: str, value: Any, said: str) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", **{name: value})
    with pytest.raises(InputError, match=rf"m\.gguf: tokenizer\.ggml\.{name} is .*; {said}"):
        load_tokenizer(path)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_tokenizer(path)
    writer = gguf.GGUFWriter(path, "llama")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(finish(writer, path))


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", train("gpt-2"), "gpt2", "gpt-2").read_bytes()
    path = tmp_path / "cut.gguf"
    for part in (0.0, 0.001, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
