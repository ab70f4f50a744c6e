"""Folders without tokenizer.json: SentencePiece's and GPT-2's files, and refusals."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE

from models.errors import InputError
from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import CORPUS, train

TEXTS = [
    "It's a small  text, with words and 1234 numbers.",
    "the cat sat on the mat; the cat is the cat",
    "naïve café ﬁne １２３ 漢字 <sep> marks",
] * 30
SENTENCEPIECE = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe": {"model_type": "bpe", "vocab_size": 130},
    "no prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 120},
    "unigram of bytes": {"model_type": "unigram", "byte_fallback": True},
    "whole pieces": {"model_type": "bpe", "user_defined_symbols": ["cat", "the c"]},
}


def write_sentencepiece(folder: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=content,
        minloglevel=2,
        hard_vocab_limit=False,
        **({"vocab_size": 400} | settings),
    )
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_tokenizer_model_is_read_as_its_library_reads_it(tmp_path: Path, kind: str) -> None:
    reference = write_sentencepiece(tmp_path, control_symbols=["<ctl>"], **SENTENCEPIECE[kind])
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.add_bos) == ("<s>", "</s>", True)
    assert loaded.stop_ids == {2}
    assert loaded.encode("<ctl>", add_special=False, control_tokens=True) == [3]
    words = ["cat", "the ", " ", "  ", "a", "é", "ﬁ", "１", "漢", "🙂", "s", "\n", "12", "."]
    words += ["<unk>", "<ctl>", "</s>", "<0x41>"]

    @given(st.lists(st.sampled_from(words), max_size=12).map("".join) | st.sampled_from(TEXTS))
    @settings(deadline=None, max_examples=150)
    def agrees(text: str) -> None:
        ids = reference.encode(text)
        assert loaded.encode(text, add_special=True) == [1, *ids]
        if 0 not in ids:  # for unknown characters the library writes a sign of its own
            assert loaded.decode(ids) == reference.decode(ids)

    agrees()


def test_markers_that_users_defined(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="bpe", user_defined_symbols=["<sep>", "<|im_end|>"])
    loaded = load_tokenizer(tmp_path)
    text = "a<sep>the<|im_end|>"
    ids = loaded.encode(text, add_special=False, control_tokens=True)
    assert {3, 4} <= set(ids)
    assert {3, 4}.isdisjoint(loaded.encode(text, add_special=False))
    assert loaded.decode([3, 4]) == "<sep>"
    assert loaded.stop_ids == {2, 4}


@pytest.mark.parametrize("legacy, again", [({}, True), ({"legacy": False}, False)])
def test_where_a_space_is_put_before_words(tmp_path: Path, legacy: dict, again: bool) -> None:
    """After each control token, or before the beginning of the text alone."""
    write_sentencepiece(tmp_path, **SENTENCEPIECE["llama"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(legacy))
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode("the</s>the", add_special=False, control_tokens=True)
    word = loaded.backend.token_to_id("▁the")
    assert ids[:2] == [word, 2]
    assert (ids[2:] == [word]) == again


def test_configuration_goes_before_the_file(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, **SENTENCEPIECE["llama"])
    config = {"add_bos_token": False, "eos_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.add_bos, loaded.bos_token, loaded.eos_token) == (False, "<s>", "<unk>")


def write_vocab_and_merges(folder: Path, name: str) -> Any:
    backend = train(name)
    backend.model.save(str(folder))
    assert isinstance(backend.model, BPE)
    return backend


@pytest.mark.parametrize(
    "file, said, name",
    [
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2TokenizerFast"}, "qwen2"),
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, "gpt-2"),
        ("config.json", {"model_type": "qwen3"}, "qwen2"),
    ],
)
def test_vocab_and_merges(tmp_path: Path, file: str, said: dict, name: str) -> None:
    backend = write_vocab_and_merges(tmp_path, name)
    (tmp_path / file).write_text(json.dumps(said))
    loaded = load_tokenizer(tmp_path)
    for text in [*CORPUS, "e\u0301 12345"]:
        assert loaded.encode(text, add_special=True) == backend.encode(text).ids
        assert loaded.decode(backend.encode(text).ids) == backend.decode(backend.encode(text).ids)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tokenizer_class": "BartTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    ],
)
def test_vocab_and_merges_that_may_be_cut_in_any_way(tmp_path: Path, config: dict) -> None:
    write_vocab_and_merges(tmp_path, "gpt-2")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vocab\.json.*GPT2Tokenizer.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_damaged_vocab_and_merges(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path, "gpt-2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt are damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),  # as the first files of Llama 3 are
        ("tokenizer.model", b""),
        ("vocab.json", b"{}"),
        ("qwen.tiktoken", b"IQ== 0\n"),
        ("spiece.model", b""),
    ],
)
def test_refusals_name_the_file_and_a_way_out(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*save_pretrained.*GGUF"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.json"],
        ["tokenizer.model"],
        ["tekken.json"],
        ["vocab.json", "merges.txt"],
        ["tokenizer_config.json"],
        ["added_tokens.json"],
    ],
)
def test_git_lfs_pointers(tmp_path: Path, names: list[str]) -> None:
    train("gpt-2").save(str(tmp_path / "tokenizer.json"))
    if names[0] not in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "tokenizer.json").unlink()
    version = "version https://git-lfs.github.com/spec/v1"
    for name in names:
        (tmp_path / name).write_text(f"{version}\noid sha256:{'0' * 64}\nsize 17209920\n")
    with pytest.raises(InputError, match=f"{re.escape(names[0])} is a Git LFS pointer.*lfs pull"):
        load_tokenizer(tmp_path)
