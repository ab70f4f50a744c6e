"""Byte-level tokenizers of tiny GGUF files against the same ones built in the library's own way."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import CORPUS, SPLITS, train, write_gguf


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_kinds(tmp_path: Path, name: str) -> None:
    backend = train(name)
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, "gpt2", name))

    @given(st.text("aB 1234'sé\n\r\t/.東e\u0301tl", max_size=40) | st.text(max_size=20))
    @settings(deadline=None, max_examples=60)
    def agrees(text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        ids = loaded.encode(text, add_special=False, control_tokens=True)
        assert ids == backend.encode(text).ids
        assert loaded.decode(ids) == backend.decode(ids)

    agrees()
    for text in CORPUS:
        assert loaded.encode(text, add_special=False) == backend.encode(text).ids
    assert loaded.stop_ids == {1}
    starts = name in ("llama-bpe", "tekken")
    assert loaded.encode("x", add_special=True)[:-1] == ([0] if starts else [])


def test_kinds_differ(tmp_path: Path) -> None:
    """Guards the test above against comparing texts on which every splitting agrees."""
    backend = train("gpt-2")
    cuts = []
    for name, split in SPLITS.items():
        backend.pre_tokenizer = split
        cuts.append((name, [piece for piece, _ in split.pre_tokenize_str(CORPUS[0] + CORPUS[1])]))
    for i, (_, first) in enumerate(cuts):
        for _, second in cuts[i + 1 :]:
            assert first != second


@pytest.mark.parametrize(
    "architecture, name", [("qwen2", "qwen2"), ("qwen3", "qwen2"), ("llama", "gpt-2")]
)
def test_byte_level_kind_is_not_named(tmp_path: Path, architecture: str, name: str) -> None:
    backend = train(name)
    path = write_gguf(tmp_path / "m.gguf", backend, "gpt2", None, architecture)
    assert_encodes_like(backend, path)


@pytest.mark.slow(10)
def test_llama3_does_not_name_its_kind(tmp_path: Path) -> None:
    backend = train("llama-bpe")
    unused = 128256 - backend.get_vocab_size()
    path = write_gguf(tmp_path / "m.gguf", backend, "gpt2", None, unused_tokens=unused)
    assert_encodes_like(backend, path)
    assert load_tokenizer(path).encode("", add_special=True) == [0]


def assert_encodes_like(backend: tokenizers.Tokenizer, path: Path) -> None:
    loaded = load_tokenizer(path)
    for text in CORPUS:
        assert loaded.encode(text, add_special=False) == backend.encode(text).ids
