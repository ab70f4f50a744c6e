"""Added tokens: those that files beside a tokenizer's own name, and the ids that they give."""

import json
import reprlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from models.errors import InputError
from models.text.control_tokens import is_special
from models.values import token_id

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Names of tokens that a model's format uses. Others (unk, pad, mask) may be words of the text.
_NAMES = ("bos_token", "eos_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def token_text(value: Any) -> str | None:
    """Return the text of a token as JSON files state it, None if they do not.

    They state it as itself, or as {"content": it}.
    """
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def special_names(config: Mapping[str, Any]) -> set[str]:
    """Return the special tokens that a configuration names."""
    named = [config.get(name) for name in _NAMES]
    for name in _LISTS:
        value = config.get(name)
        named += value if isinstance(value, list) else value.values() if value else []
    return {text for text in map(token_text, named) if text}


def tokens_of_decoder(entries: Any, where: str) -> dict[int, AddedToken]:
    """Tokens by id from what tokenizer_config.json has as added_tokens_decoder. InputError."""
    expected = f'{where} is {reprlib.repr(entries)}; expected {{"id": {{"content": text}}}}'
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise InputError(expected)
    tokens = {}
    for key, entry in entries.items():
        text = token_text(entry)
        if not key.isdecimal() or not text:
            raise InputError(expected)
        given = entry if isinstance(entry, dict) else {}
        flags = {name: given[name] for name in _FLAGS if isinstance(given.get(name), bool)}
        tokens[token_id(int(key), where)] = AddedToken(text, **({"normalized": False} | flags))
    return tokens


def tokens_of_list(entries: Mapping[str, Any], special: set[str], where: str) -> dict[int, Any]:
    """Tokens by id from what added_tokens.json holds: ids by text. Raises InputError."""
    return {
        token_id(index, f"{where}: {text!r}"): AddedToken(
            text, normalized=False, special=text in special or is_special(text)
        )
        for text, index in entries.items()
        if text
    }


def add_special(backend: tokenizers.Tokenizer, names: set[str]) -> None:
    """Make special tokens of those `names` that are in the vocabulary and nothing more yet."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    known = {name: backend.token_to_id(name) for name in names - added}
    found = sorted((index, name) for name, index in known.items() if index is not None)
    backend.add_tokens([AddedToken(name, normalized=False, special=True) for _, name in found])


def with_tokens(
    backend: tokenizers.Tokenizer, tokens: Mapping[int, AddedToken], where: str
) -> tokenizers.Tokenizer:
    """Return the tokenizer with `tokens`, by id, among its added ones.

    Raise InputError where they clash.

    Tokens that it has added already stay as they are.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = {}
    for index, token in sorted(tokens.items()):
        known, other = backend.token_to_id(token.content), backend.id_to_token(index)
        if known not in (None, index) or other not in (None, token.content):
            raise InputError(
                f"{where}: token {index} is {token.content!r}, but in the vocabulary "
                + (f"{token.content!r} is token {known}" if other is None else f"it is {other!r}")
                + "; the files do not belong together: take all from one model"
            )
        if token.content not in added:
            new[index] = token
    # The library counts on from the vocabulary's size; ids that it would not give are written in.
    size = backend.get_vocab_size(with_added_tokens=True)
    absent = [index for index, token in new.items() if backend.token_to_id(token.content) is None]
    if absent != list(range(size, size + len(absent))):
        backend = _written_in(backend, {index: new[index].content for index in absent}, where)
    backend.add_tokens([new[index] for index in sorted(new)])
    return backend


def _written_in(
    backend: tokenizers.Tokenizer, texts: Mapping[int, str], where: str
) -> tokenizers.Tokenizer:
    """Return the tokenizer with more tokens in its vocabulary, at ids that need not follow on."""
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    # What was added before must keep its ids, which are counted from the vocabulary's size.
    own = {token["content"]: token["id"] for token in content["added_tokens"]}
    if not isinstance(vocab, dict):
        raise InputError(
            f"{where}: the ids {sorted(texts)} leave gaps in the vocabulary, which its kind of "
            "tokenizer cannot have; save it anew with transformers' save_pretrained"
        )
    vocab |= own | {text: index for index, text in texts.items()}
    return tokenizers.Tokenizer.from_str(json.dumps(content))
