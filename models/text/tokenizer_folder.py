"""Reads the tokenizer of a Hugging Face folder, from whichever of the known files it holds."""

import reprlib
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from models.errors import InputError
from models.families import FAMILIES
from models.paths import refuse_stand_in
from models.text.added_tokens import (
    add_special,
    special_names,
    tokens_of_decoder,
    tokens_of_list,
    with_tokens,
)
from models.text.pre_tokenizers import PRE_TOKENIZERS
from models.text.sentencepiece_file import read_sentencepiece
from models.text.tekken_file import read_tekken
from models.text.text_files import one_line, read_json, read_text
from models.values import token_ids

# vocab.json and merges.txt do not say how texts are cut: the class that wrote them does.
_CUT_BY_CLASS = {
    row.tokenizer_class: row.pre_tokenizer for row in FAMILIES.values() if row.tokenizer_class
} | {"GPT2Tokenizer": "gpt-2"}
# Files of tokenizers that are not read here, by which a refusal is to be understood.
_OTHER_FILES = ("vocab.json", "merges.txt", "*.tiktoken", "*.model", "*.vocab", "vocab.txt")


def read_folder_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer and its configuration from a folder's files.

    The configuration has the keys of tokenizer_config.json, and `stop_token_ids`.
    Raises InputError if there is none that can be read, or if files contradict one another.
    """
    file, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    names = read_json(folder / "special_tokens_map.json")
    config = names | read_json(file)
    backend, own = _read_backend(folder, config)
    for name, value in own.items():
        if config.get(name) is None:
            config[name] = value

    special = special_names(config) | special_names(names)
    where = f"{file}: added_tokens_decoder"
    decoder = tokens_of_decoder(config.get("added_tokens_decoder"), where)
    backend = with_tokens(backend, decoder, where)
    listed = folder / "added_tokens.json"
    backend = with_tokens(
        backend, tokens_of_list(read_json(listed), special, str(listed)), str(listed)
    )
    add_special(backend, special)

    template = read_text(folder / "chat_template.jinja")
    if template is None:
        template = _default_template(config.get("chat_template"), file)
    config["chat_template"] = template
    config["stop_token_ids"] = [
        *token_ids(config.get("stop_token_ids"), f"{file}: stop_token_ids"),
        *token_ids(read_json(generation).get("eos_token_id"), f"{generation}: eos_token_id"),
    ]
    return backend, config


def _read_backend(
    folder: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer, and what its own file says that tokenizer_config.json may not."""
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json"), {}
    if (folder / "tekken.json").is_file():
        return read_tekken(folder / "tekken.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder, config), {}
    if (folder / "tokenizer.model").is_file():
        refuse_stand_in(folder / "tokenizer.model")
        return read_sentencepiece(folder / "tokenizer.model", config, _way_out(folder))
    found = sorted({path.name for name in _OTHER_FILES for path in folder.glob(name)})
    if found:
        raise InputError(
            f"{folder} holds no tokenizer.json but {', '.join(found)}, which cannot be read: "
            f"{_way_out(folder)}"
        )
    raise InputError(
        f"{folder} holds no tokenizer: expected tokenizer.json, tokenizer.model, tekken.json, or "
        "vocab.json and merges.txt; download them with the model's other files"
    )


def _way_out(folder: Path) -> str:
    return (
        "write a tokenizer.json there with transformers, "
        f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}"), or use a GGUF file'
    )


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    refuse_stand_in(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file} is not a tokenizer: {one_line(error)}") from error
    # Whoever saved the file may have left on what cuts or fills texts to a training run's length.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_vocab_and_merges(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer, cut as the class that is named for it does."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    refuse_stand_in(vocab)
    refuse_stand_in(merges)
    given = config.get("tokenizer_class")
    if given is None:
        model_type = read_json(folder / "config.json").get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        name = family.pre_tokenizer if family else None
    else:
        name = _CUT_BY_CLASS.get(str(given).removesuffix("Fast"))
    if name is None or config.get("add_prefix_space"):
        raise InputError(
            f"{vocab} and merges.txt do not say how texts are cut, and tokenizer_config.json names "
            f"the class {reprlib.repr(given)}; known are {', '.join(_CUT_BY_CLASS)} without "
            f"add_prefix_space: name one of them there, or {_way_out(folder)}"
        )
    try:
        backend = tokenizers.Tokenizer(BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{vocab} and merges.txt are damaged: {one_line(error)}") from error
    kind = PRE_TOKENIZERS[name]
    if kind.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _default_template(given: Any, file: Path) -> str | None:
    """One template from what `file` holds: a text, or a list of named ones. Raises InputError."""
    template = given
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        defaults = [entry for entry in given if entry.get("name") == "default"]
        template = next((entry.get("template") for entry in [*defaults, *given]), None)
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{file}: chat_template is {reprlib.repr(given)}; expected a text, or a list of "
            '{"name": text, "template": text}'
        )
    return template
