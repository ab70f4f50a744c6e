"""Folders without tokenizer.json: SentencePiece's, Mistral's and GPT-2's files, and refusals."""

import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from models.errors import InputError
from models.tokenizer import load_tokenizer
from tests.models.test_gguf_tokenizer import CORPUS, SPECIAL, train

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


def letters() -> dict[str, int]:
    """Bytes by the letters that stand for them in byte-level vocabularies."""
    found = {}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in map(chr, range(0x800)):
        written = split.pre_tokenize_str(char)[0][0]
        found |= dict(zip(written, char.encode(), strict=True))
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found))
    return found | dict(zip(rest, sorted(set(range(256)) - set(found.values())), strict=True))


PATTERN = r"[^\W\d]+|\d| ?[^\s\w]+|\s+"


def write_tekken(folder: Path, count: int = 30, **more: Any) -> list[bytes]:
    """tekken.json of a trained vocabulary and `count` control tokens; returns what is ranked."""
    vocab = train("tekken").get_vocab()
    byte_of = letters()
    longer = sorted((i, token) for token, i in vocab.items() if len(token) > 1)
    ranked = [bytes([byte]) for byte in range(256)]
    ranked += [bytes(byte_of[c] for c in token) for _, token in longer if token not in SPECIAL]
    ranked.append(b"[INST]")  # a text that is spelt as a control token
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ranked)
    ]
    unused = {"rank": len(ranked), "token_bytes": base64.b64encode(b"unused").decode()}
    config = {
        "pattern": PATTERN,
        "default_vocab_size": len(ranked) + count,
        "default_num_special_tokens": count,
        "version": "v3",
    }
    content = {"config": config, "vocab": [unused, *reversed(entries)]} | more
    (folder / "tekken.json").write_text(json.dumps(content))
    return ranked


def merge_by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, straight: the neighbours of the lowest rank merge first, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tekken_merges_by_rank(tmp_path: Path) -> None:
    ranked = write_tekken(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ranks = {token: rank for rank, token in enumerate(ranked[:-1])}
    assert (loaded.bos_token, loaded.eos_token, loaded.stop_ids) == ("<s>", "</s>", {2})

    @given(st.text("aBing 12'sé\n東[IST]", max_size=30) | st.sampled_from(CORPUS))
    @settings(deadline=None, max_examples=150)
    def agrees(text: str) -> None:
        pieces = re.findall(PATTERN, text)
        assert "".join(pieces) == text
        expected = [30 + i for piece in pieces for i in merge_by_rank(piece.encode(), ranks)]
        ids = loaded.encode(text, add_special=True)
        assert ids == [1, *expected]
        assert loaded.decode(ids) == text

    agrees()
    ids = loaded.encode("[INST]a[/INST]</s>", add_special=False, control_tokens=True)
    assert [ids[0], *ids[-2:]] == [3, 4, 2]
    assert min(loaded.encode("[INST]a[/INST]</s>", add_special=False)) >= 30


def test_tekken_names_its_control_tokens(tmp_path: Path) -> None:
    named = [
        {"rank": 0, "token_str": "<unk>", "is_control": True},
        {"rank": 1, "token_str": "<s>", "is_control": True},
        {"rank": 2, "token_str": "</s>", "is_control": True},
        {"rank": 3, "token_str": "[THINK]", "is_control": False},
    ]
    write_tekken(tmp_path, count=6, special_tokens=named)
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode("[THINK]<SPECIAL_5></s>", add_special=False, control_tokens=True)
    assert ids == [3, 5, 2]
    assert loaded.decode(ids) == "[THINK]"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"config": {}, "vocab": []},
        {"config": 5},
        {
            "config": {
                "pattern": "(",
                "default_vocab_size": 1,
                "default_num_special_tokens": 0,
            },
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
        },
        {
            "config": {"pattern": "a", "default_vocab_size": 9, "default_num_special_tokens": 2},
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
        },
    ],
)
def test_damaged_tekken(tmp_path: Path, content: Any) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tekken\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


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
