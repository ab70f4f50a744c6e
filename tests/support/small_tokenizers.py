"""Small tokenizers of several kinds, with the control tokens of a chat among their added ones."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from models.text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"]
SHOWN = ["<think>", "</think>", "<tool_response>", "</tool_response>"]  # added, but not special
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzAINPSTW0123456789</>|_[](){}.,:;!?'\"- \n\t"


def byte_level(*, whole_pieces: bool = False) -> tokenizers.Tokenizer:
    """Bytes and some merges; runs of spaces are added tokens, and text."""
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "ab"), ("<", "s"), ("<s", ">"), ("i", "m"), ("Ġ", "Ġ")]
    vocab = [*vocab, *dict.fromkeys(left + right for left, right in merges)]
    # Here "<s>" is a control token that merges could make.
    backend = tokenizers.Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(vocab)},
            merges=merges,
            ignore_merges=whole_pieces,
        )
    )
    pattern = Regex(r"\s?\S+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    add(backend)
    backend.add_tokens([AddedToken("    ", normalized=False)])
    return backend


def pieces(*, unigram: bool = False, first: bool = False) -> tokenizers.Tokenizer:
    """Characters and some longer pieces, a leading space before the text or after each marker."""
    tokens = ["<unk>", *SPECIAL, "▁", *LETTERS.replace(" ", ""), "▁a", "ab", "▁ab", "<s", "im"]
    if unigram:
        scored = [(token, -float(len(tokens) - len(token))) for token in tokens]
        backend = tokenizers.Tokenizer(Unigram(scored, unk_id=0, byte_fallback=False))
    else:
        merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("<", "s"), ("<s", ">"), ("i", "m")]
        vocab = {token: index for index, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if first:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    add(backend, single_word=not unigram)  # a unigram model finds the marker in its vocabulary
    return backend


def add(backend: tokenizers.Tokenizer, *, single_word: bool = True) -> None:
    """Adds the markers; some of them take white space beside them."""
    flags: dict[str, Any] = {"normalized": False, "special": True}
    takes = {
        "<|im_start|>": {"rstrip": True},
        "[INST]": {"lstrip": True, "single_word": single_word},
    }
    backend.add_tokens([AddedToken(text, **flags, **takes.get(text, {})) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in SHOWN])


KINDS = {
    "byte-level": byte_level,
    "whole pieces": lambda: byte_level(whole_pieces=True),
    "pieces": pieces,
    "pieces, first space": lambda: pieces(first=True),
    "unigram": lambda: pieces(unigram=True),
}


def save(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    """Writes a folder, and loads it."""
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)
