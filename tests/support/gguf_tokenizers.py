"""Small tokenizers, trained or written out, and GGUF files that hold them."""

import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

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
