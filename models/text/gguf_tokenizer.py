"""Builds a tokenizer from the metadata of a GGUF file."""

import re
import reprlib
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE

from models.checkpoints.gguf_header import END_KINDS, named_tokens, read_gguf_header
from models.errors import InputError
from models.families import family_of_gguf
from models.text.control_tokens import END_TOKENS, is_special, looks_like_marker
from models.text.pre_tokenizers import PRE_TOKENIZERS
from models.text.sentencepiece_bpe import merges_from_scores, sentencepiece_bpe, vocabulary
from models.values import token_id

SUPPORTED_PRE_TOKENIZERS = tuple(sorted(PRE_TOKENIZERS))
SUPPORTED_MODELS = ("gpt2", "llama")  # kinds of tokenizers, whatever the family of the model
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # what stands for a byte, whether typed so or not
# What the metadata must be where they are there at all.
_ARRAYS = ("ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges")
_TEXTS = ("ggml.pre", "chat_template")


def read_gguf_tokenizer(path: str | Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a GGUF file, and its configuration.

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

    _add_tokens(backend, metadata, set(ids.values()))

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
    """Return the pre-tokenizer of a byte-level file that names none, as old files do."""
    family = family_of_gguf(architecture)
    return (family and family.unnamed_pre_tokenizer(num_tokens)) or "default"


def _add_tokens(backend: tokenizers.Tokenizer, metadata: dict[str, Any], named: set[int]) -> None:
    """Make the file's control and user-defined tokens ones that are matched whole.

    Both are matched wherever a text holds them; decoding leaves out the first only. Chat markers
    whose type says that they are text, as some converters write them, or that have no type, are
    known by what they look like: the template writes them, or they end a text, or the file names
    them as its beginning or end.

    named: the ids of the last.
    """
    tokens = metadata["ggml.tokens"]
    kinds = dict(enumerate(metadata.get("ggml.token_type") or []))
    template = metadata.get("chat_template", "")
    # No merge makes a marker: if one does, the token is text.
    merged = {merge.replace(" ", "", 1) for merge in metadata.get("ggml.merges", ())}
    normal = (gguf.TokenType.NORMAL, 0, None)
    added: dict[bool, list[AddedToken]] = {True: [], False: []}
    for index, token in enumerate(tokens):
        kind = kinds.get(index)
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
        elif kind in normal and looks_like_marker(token):
            written = token in template or token in END_TOKENS
            if index not in named and (not written or token in merged):
                continue
            special = index in named or is_special(token)
        else:
            continue
        added[special].append(AddedToken(token, normalized=False, special=special))
    for special in (True, False):
        backend.add_tokens(added[special])


def _byte_level_bpe(metadata: dict[str, Any], name: str) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's kind: merges over bytes. Also returns whether it adds BOS if the file is silent."""
    kind = PRE_TOKENIZERS.get(name)
    if kind is None:
        raise InputError(
            f"pre-tokenizer {name!r} is unknown, and texts cut otherwise are other tokens than the "
            "model knows: use the folder of the model's tokenizer.json and safetensors files "
            f"instead; known are {', '.join(SUPPORTED_PRE_TOKENIZERS)}"
        )
    if "ggml.merges" not in metadata:
        raise InputError("the tokenizer lacks its merges (tokenizer.ggml.merges)")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=vocabulary(metadata["ggml.tokens"]),
            merges=merges,
            ignore_merges=kind.whole_pieces,
        )
    )
    if kind.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend, kind.add_bos


def _sentencepiece_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Llama 2's kind: merges over characters, ordered by score; unknown characters as bytes."""
    tokens = metadata["ggml.tokens"]
    if "ggml.merges" in metadata:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
    elif "ggml.scores" in metadata:
        kinds = metadata.get("ggml.token_type") or []
        whole = (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE)
        unmerged = {index for index, kind in enumerate(kinds) if kind in whole}
        unmerged |= {index for index, token in enumerate(tokens) if _BYTE.fullmatch(token)}
        merges = merges_from_scores(tokens, metadata["ggml.scores"], unmerged)
    else:
        raise InputError("the tokenizer lacks its scores (tokenizer.ggml.scores)")
    key = "ggml.unknown_token_id"
    return sentencepiece_bpe(
        tokens,
        merges,
        unknown=token_id(metadata.get(key, 0), f"tokenizer.{key}"),
        leading_space=bool(metadata.get("ggml.add_space_prefix", True)),
    )
