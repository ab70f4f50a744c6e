"""Builds a tokenizer from the metadata of a GGUF file."""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from models.errors import InputError
from models.gguf_header import END_KINDS, named_tokens, read_gguf_header
from models.values import token_id

# How a text is cut before byte pairs are merged, by the names that GGUF files use. The patterns are
# part of the models: other cuts give other tokens than those that a model was trained on.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_GPT2_NAMES = ("gpt-2", "gpt2", "default")
# These take a whole piece that is in the vocabulary as one token, whatever the merges say, and
# start every text with the beginning-of-text token unless the file says otherwise.
_WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "tekken")
SUPPORTED_PRE_TOKENIZERS = tuple(sorted([*_PATTERNS, *_GPT2_NAMES, "smollm"]))
SUPPORTED_MODELS = ("gpt2", "llama")
_LLAMA3_TOKENS = 128256  # by which a file of Llama 3 is known that names no pre-tokenizer
# What the metadata must be where they are there at all.
_ARRAYS = ("ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges")
_TEXTS = ("ggml.pre", "chat_template")


def read_gguf_tokenizer(path: str | Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and its configuration.

    The configuration has keys of Hugging Face's tokenizer_config.json (`bos_token`, `eos_token`,
    `add_bos_token`, `chat_template`), and `stop_token_ids`.
    Raises InputError if the file is none, is damaged, or holds a kind of tokenizer unknown here.
    """
    whole = read_gguf_header(Path(path)).metadata
    metadata = {
        name.removeprefix("tokenizer."): value
        for name, value in whole.items()
        if name.startswith("tokenizer.")
    }

    _check_kinds(path, metadata)
    tokens = metadata.get("ggml.tokens")
    if not tokens:
        raise InputError(f"{path} holds no tokenizer (no tokenizer.ggml.tokens)")
    ids = named_tokens(path, whole)
    kind = metadata.get("ggml.model")
    if kind not in SUPPORTED_MODELS:
        raise InputError(
            f"{path} has a tokenizer of kind {kind!r}; supported: {', '.join(SUPPORTED_MODELS)}"
        )
    try:
        if kind == "gpt2":
            name = metadata.get("ggml.pre") or _unnamed_pre_tokenizer(
                whole.get("general.architecture"), len(tokens)
            )
            backend, add_bos = _byte_level_bpe(metadata, name)
        else:
            backend, add_bos = _sentencepiece_bpe(metadata), True
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = " ".join(str(error).split())
        raise InputError(f"{path} holds a tokenizer that cannot be built: {reason}") from error

    # Both are matched whole wherever a text holds them; decoding leaves out the first only.
    kinds = metadata.get("ggml.token_type") or []
    for special, wanted in ((True, gguf.TokenType.CONTROL), (False, gguf.TokenType.USER_DEFINED)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, kind in zip(tokens, kinds, strict=False)
                if kind == wanted
            ]
        )

    def token_of(name: str) -> str | None:
        index = ids.get(name)
        return tokens[index] if index is not None and index < len(tokens) else None

    return backend, {
        "bos_token": token_of("bos"),
        "eos_token": token_of("eos"),
        "add_bos_token": metadata.get("ggml.add_bos_token", add_bos),
        "chat_template": metadata.get("chat_template"),
        "stop_token_ids": [ids[kind] for kind in END_KINDS if kind in ids],
    }


def _check_kinds(path: str | Path, metadata: dict[str, Any]) -> None:
    for names, kind, expected in ((_ARRAYS, list, "an array"), (_TEXTS, str, "a text")):
        for name in names:
            if name in metadata and not isinstance(metadata[name], kind):
                given = reprlib.repr(metadata[name])
                raise InputError(f"{path}: tokenizer.{name} is {given}; expected {expected}")


def _unnamed_pre_tokenizer(architecture: Any, num_tokens: int) -> str:
    """The pre-tokenizer of a byte-level file that names none, as old files do."""
    if architecture in ("qwen2", "qwen3"):
        return "qwen2"
    if architecture == "llama" and num_tokens == _LLAMA3_TOKENS:
        return "llama-bpe"
    return "default"


def _byte_level_bpe(metadata: dict[str, Any], name: str) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's kind: merges over bytes. Also returns whether it adds BOS if the file is silent."""
    if name in _GPT2_NAMES:
        split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif name == "smollm":
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif name in _PATTERNS:
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        supported = ", ".join(SUPPORTED_PRE_TOKENIZERS)
        raise InputError(f"pre-tokenizer {name!r} is unknown; supported: {supported}")
    if "ggml.merges" not in metadata:
        raise InputError("the tokenizer lacks its merges (tokenizer.ggml.merges)")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=_vocabulary(metadata["ggml.tokens"]),
            merges=merges,
            ignore_merges=name in _WHOLE_PIECES,
        )
    )
    if _PATTERNS.get(name) == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend, name in _WHOLE_PIECES


def _sentencepiece_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Llama 2's kind: merges over characters, ordered by score; unknown characters as bytes."""
    tokens = metadata["ggml.tokens"]
    if "ggml.merges" in metadata:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
    elif "ggml.scores" in metadata:
        merges = merges_from_scores(tokens, metadata["ggml.scores"])
    else:
        raise InputError("the tokenizer lacks its scores (tokenizer.ggml.scores)")
    key = "ggml.unknown_token_id"
    unknown = token_id(metadata.get(key, 0), f"tokenizer.{key}")
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=_vocabulary(tokens),
            merges=merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading_space = metadata.get("ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * bool(leading_space) + [normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * bool(leading_space)
    )
    return backend


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies, the first to apply first.

    A token is merged from each pair of tokens that spell it. Higher scores go first; where several
    pairs spell the same token, those of lower ids do.
    """
    ids = _vocabulary(tokens)
    ordered = []
    for merged, index in ids.items():
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in ids and right in ids:
                ordered.append((-scores[index], index, ids[left], ids[right], left, right))
    ordered.sort()
    return [(left, right) for *_, left, right in ordered]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by token; a token listed twice keeps its first id."""
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    return vocabulary
