"""Builds a tokenizer from tekken.json, the file of Mistral's own library."""

import base64
import itertools
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.errors import InputError
from models.text.sentencepiece_bpe import merges_from_scores
from models.text.text_files import one_line, read_json

# Files of version 7 and before do not list their control tokens; these are they, by id.
_OLD_CONTROL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
_BOS, _EOS = "<s>", "</s>"


def read_tekken(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer, and what tokenizer_config.json would say of it; raise InputError.

    Control tokens come first; the bytes of the others are ranked, and merge in the ranks' order.
    """
    content = read_json(file)
    try:
        sizes = content["config"]
        num_control, num_tokens = sizes["default_num_special_tokens"], sizes["default_vocab_size"]
        ranked = sorted(content["vocab"], key=lambda entry: entry["rank"])
        ranked = ranked[: num_tokens - num_control]
        if [entry["rank"] for entry in ranked] != list(range(num_tokens - num_control)):
            raise InputError(
                f"{file} lacks tokens: of its ranks {len(ranked)} are there, expected "
                f"{num_tokens - num_control}; download it again"
            )
        letters = _letters_of_bytes()
        texts = [
            "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))
            for entry in ranked
        ]
        control = _control_tokens(content.get("special_tokens"), num_control)
        backend = _build(texts, control, sizes["pattern"])
    except InputError:
        raise
    except Exception as error:  # keys, kinds and the tokenizers library's own
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{file} is not a tekken tokenizer: {reason}") from error
    named = {token.content for token in control}
    return backend, {
        "bos_token": _BOS if _BOS in named else None,
        "eos_token": _EOS if _EOS in named else None,
        "add_bos_token": _BOS in named,
    }


def _control_tokens(listed: Any, count: int) -> list[AddedToken]:
    """Return the first `count` tokens.

    Those that the file does not name have names of their ids.
    """
    if listed is None:
        named = {i: (text, True) for i, text in enumerate(_OLD_CONTROL_TOKENS)}
    else:
        named = {
            entry["rank"]: (entry["token_str"], bool(entry.get("is_control", True)))
            for entry in listed
        }
    tokens = [named.get(i, (f"<SPECIAL_{i}>", True)) for i in range(count)]
    return [AddedToken(text, normalized=False, special=control) for text, control in tokens]


def _build(texts: list[str], control: list[AddedToken], pattern: str) -> tokenizers.Tokenizer:
    names = [token.content for token in control]
    # A text that is spelt as a control token is no token of its own: it is put together of others.
    unmerged = {i for i, text in enumerate(texts) if text in set(names)}
    merges = merges_from_scores(texts, [-float(rank) for rank in range(len(texts))], unmerged)
    vocab = {text: len(names) + rank for rank, text in enumerate(texts) if rank not in unmerged}
    vocab |= {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(control)
    return backend


def _letters_of_bytes() -> list[str]:
    """Return the letter that byte-level vocabularies write for each byte.

    Printable ones stand for themselves; the others have those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]
