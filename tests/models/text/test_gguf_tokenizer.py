"""Tokenizers built from tiny GGUF files against the same ones built in the library's own way."""

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.errors import InputError
from models.text.sentencepiece_bpe import merges_from_scores
from models.text.tokenizer import load_tokenizer

CORPUS = [
    "It's 2024: we'll see 123456 words, don't you think? DON'T!  Two  spaces\n\n\nand lines\r\n",
    "camelCaseWords HTTPServer naïve café Straße Ελλάδα Москва 東京 １２３ 1,000.5 a/b//c\n/x",
    "  indented 12 345 6789\n\t\ttabs   \n   trailing   ",
] * 3

# The patterns as their models' authors published them, written out here a second time.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]
    ),
    "tekken": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(TEKKEN), "isolated"), BYTES]),
}
SPECIAL = ["<|bos|>", "<|eot_id|>"]


def train(name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of 500 tokens, split the given way."""
    backend = tokenizers.Tokenizer(BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = SPLITS[name]
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def write_gguf(
    path: Path,
    backend: tokenizers.Tokenizer,
    model: str,
    pre: str | None,
    architecture: str = "llama",
    unused_tokens: int = 0,
) -> Path:
    """The tokenizer of `backend` as a GGUF file's metadata."""
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += [f"<unused {i}>" for i in range(unused_tokens)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    )
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


# ---- SentencePiece, as Llama 2 has it

PIECES = [
    "▁",
    "▁the",
    "▁t",
    "he",
    "t",
    "h",
    "e",
    "▁th",
    "in",
    "i",
    "n",
    "g",
    "ing",
    "aa",
    "a",
    "▁a",
]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
SPM_SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]


def write_sentencepiece(path: Path, **extra: Any) -> Path:
    kind = gguf.TokenType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPM_TOKENS)
    writer.add_token_scores(SPM_SCORES)
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    types += [kind.BYTE] * 256 + [kind.NORMAL] * len(PIECES)
    values = {"token_type": list(map(int, types)), "bos_token_id": 1, "eos_token_id": 2} | extra
    adds = {
        bool: writer.add_bool,
        int: writer.add_int32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in values.items():
        adds[type(value)](f"tokenizer.ggml.{name}", value)
    return finish(writer, path)


def merge_by_score(text: str) -> list[int]:
    """SentencePiece's own rule, straight: merge the best-scored neighbours, leftmost first."""
    vocab = {token: index for index, token in enumerate(SPM_TOKENS)}
    parts = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [
            (-SPM_SCORES[vocab[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in vocab
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [3 + byte for byte in part.encode()]
    return ids


@given(st.text("the inga é東", max_size=30))
@settings(deadline=None, max_examples=100)
def test_sentencepiece_merges_by_score(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "spm.gguf"
    if not path.exists():
        write_sentencepiece(path)
    loaded = load_tokenizer(path)
    ids = loaded.encode(text, add_special=True)
    assert ids == [1, *merge_by_score(text)]
    assert loaded.decode(ids) == text
    stream = loaded.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_sentencepiece_flags(tmp_path: Path) -> None:
    loaded = load_tokenizer(
        write_sentencepiece(tmp_path / "m.gguf", add_bos_token=False, add_space_prefix=False)
    )
    assert loaded.encode("the", add_special=True) == [SPM_TOKENS.index(t) for t in ("t", "he")]
    assert loaded.decode(loaded.encode(" the", add_special=True)) == " the"
    assert loaded.stop_ids == {2}


def test_merges_from_scores() -> None:
    assert merges_from_scores(["a", "b", "ab", "aab", "aa"], [0.0, 0.0, -2.0, -1.0, -3.0]) == [
        ("a", "ab"),
        ("aa", "b"),
        ("a", "b"),
        ("a", "a"),
    ]


# ---- damage


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
