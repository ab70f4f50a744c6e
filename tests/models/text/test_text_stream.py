"""Streams of tokens: what they continue, invalid bytes, and a cost that does not grow."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

import models.text.text_stream
from models.text.tokenizer import Tokenizer
from tests.support.gguf_tokenizers import write_sentencepiece
from tests.support.small_tokenizers import KINDS, byte_level, pieces, save


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    stream = tokenizer.stream() if prompt is None else tokenizer.stream(prompt)
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["ab", "ab im ab", "ab\n", "a b a b a b a b a b a b", " "])
def test_a_continuation_keeps_its_space(tmp_path: Path, kind: str, text: str) -> None:
    tokenizer = save(tmp_path, KINDS[kind]())
    whole = tokenizer.encode(text + " ab a", add_special=True)
    cut = len(tokenizer.encode(text, add_special=True))
    before = tokenizer.decode(whole[:cut])
    after = tokenizer.decode(whole).removeprefix(before)
    assert streamed(tokenizer, whole[cut:], whole[:cut]) == after
    if text == "ab":
        assert after == " ab a"
        if kind not in ("byte-level", "whole pieces"):  # which hold their spaces themselves
            assert streamed(tokenizer, whole[cut:]) == "ab a"


def test_an_answer_in_a_chat_begins_without_a_space(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, pieces())
    ids = tokenizer.encode("ab im", add_special=False)
    end = tokenizer.backend.token_to_id("<|im_start|>")
    assert streamed(tokenizer, ids) == "ab im"
    assert streamed(tokenizer, ids, [end]) == "ab im"  # a marker has no text to continue


def test_special_tokens_do_not_hide_what_stands_before(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, pieces())
    word, mark = (tokenizer.backend.token_to_id(text) for text in ("▁ab", "<|im_end|>"))
    assert streamed(tokenizer, [word, *[mark] * 100, word, 10**6, word]) == "ab ab ab"


def byte_ids(content: bytes) -> list[int]:
    """Of a tokenizer of bytes alone."""
    return list(content)


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import tokenizers

    from models.text.tekken_file import _letters_of_bytes

    vocab = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return save(tmp_path_factory.mktemp("bytes"), backend)


some_bytes = st.lists(
    st.sampled_from([b"a", b" ", "é".encode(), "漢".encode(), "👍".encode()])
    | st.integers(0x80, 0xFF).map(lambda byte: bytes([byte])),
    max_size=60,
).map(b"".join)


@given(some_bytes, st.integers(0, 60))
@settings(deadline=None, max_examples=300)
def test_any_bytes(of_bytes: Tokenizer, content: bytes, cut: int) -> None:
    ids = byte_ids(content)
    text = content.decode(errors="replace")
    assert streamed(of_bytes, ids) == text
    # What a prompt holds of a character is given out with the rest of it.
    before = content[:cut].decode(errors="replace").rstrip("\ufffd")
    after = streamed(of_bytes, ids[cut:], ids[max(0, cut - 8) : cut])
    assert text.startswith(before)
    assert after.strip("\ufffd") == text[len(before) :].strip("\ufffd")


@pytest.mark.parametrize("byte", [0x80, 0xE6, 0xFF])
def test_endless_invalid_bytes_cost_no_more_as_they_go_on(of_bytes: Tokenizer, byte: int) -> None:
    decoded = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return of_bytes.decode(ids)

    stream = models.text.text_stream.TextStream(decode, lambda index: True)
    text = "".join(stream.push(byte) for _ in range(400)) + stream.flush()
    assert text == "\ufffd" * 400
    assert max(decoded) <= 64
    assert sum(decoded) <= 400 * 100


def test_bytes_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = write_sentencepiece(tmp_path / "m.gguf")
    from models.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    ids = [3 + byte for byte in "é漢👍".encode()]
    assert streamed(loaded, ids) == "é漢👍"
    assert streamed(loaded, [3 + 0xE6] * 100) == "\ufffd" * 100


def test_long_streams_decode_a_few_tokens_at_a_time(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level())
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    stream = models.text.text_stream.TextStream(decode, lambda index: True, [5] * 1000)
    for _ in range(300):
        stream.push(70)
    assert max(lengths) <= 12
