"""Text to token ids and back, from a Hugging Face folder, a GGUF file or a converted checkpoint."""

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from models.chat import apply_chat
from models.errors import InputError
from models.gguf_tokenizer import read_gguf_tokenizer
from models.values import token_ids

# Tokens that end a turn or a text, by the names that model families gave them. A chat model may
# name only one of them as its end of text, and yet end its answer with another.
END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes text the way that one model was trained with.

    Fields:
        backend: vocabulary, merges and pre-tokenizer
        add_bos: whether `encode(text, add_special=True)` starts with the beginning-of-text token
        bos_token, eos_token: their text, or None where the model has none
        stop_ids: a generation ends with the first of these
        chat_template: Jinja source, or None where the model knows no chat
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    add_bos: bool
    bos_token: str | None
    eos_token: str | None
    stop_ids: frozenset[int]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if there is one."""
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as such.

        add_special: start with the beginning-of-text token, if the model wants one.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        bos_id = self.bos_id
        return [bos_id, *ids] if add_special and self.add_bos and bos_id is not None else ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer starts.

        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
        Raises InputError if the model has no chat template, or the template refuses the messages.
        """
        return self.encode_chat_text(self.chat_text(messages))

    def chat_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text, special tokens written out; see `encode_chat`."""
        if self.chat_template is None:
            raise InputError("the model has no chat template: pass the prompt as it is (--raw)")
        return apply_chat(
            self.chat_template, messages, bos_token=self.bos_token, eos_token=self.eos_token
        )

    def encode_chat_text(self, text: str) -> list[int]:
        """Token ids of what `chat_text` gave, whatever was appended to it."""
        # Most templates write the beginning-of-text token themselves; it must not come twice.
        written = self.bos_token is not None and text.startswith(self.bos_token)
        return self.encode(text, add_special=not written)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """Decodes one token after the other, for printing while they are generated."""
        return TextStream(self)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load_tokenizer(folder)` reads."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "add_bos_token": self.add_bos,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "stop_token_ids": sorted(self.stop_ids),
            "chat_template": self.chat_template,
        }
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


class TextStream:
    """Turns token ids into text piece by piece; the pieces never hold half a character.

    `tokenizers.decoders.DecodeStream` is not used: it raises on byte sequences that are not UTF-8,
    which a model is free to generate.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # ids[start:shown] have been printed, and give ids[shown:] the context they are decoded in:
        # whether a word starts with a space may depend on what stands before it.
        self._start = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes: "" while a character still lacks bytes."""
        self._ids.append(int(token))
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text = self._pending()
        self._start = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: a Hugging Face folder, a GGUF file, or a converted checkpoint.

    Raises InputError if there is none at `path`, or one that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        backend, config = _read_folder(path)
    elif path.is_file():
        backend, config = read_gguf_tokenizer(path)
    else:
        raise InputError(f"no such file or folder: {path}")

    def text_of(name: str) -> str | None:
        # Older files hold {"content": "<s>", "lstrip": ...} in place of "<s>".
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        known = isinstance(token, str) and backend.token_to_id(token) is not None
        return token if known else None

    bos_token, eos_token = text_of("bos_token"), text_of("eos_token")
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        # Nothing is said, so what tokenizer.json itself adds counts.
        added = backend.encode("").ids
        add_bos = bos_token is not None and added[:1] == [backend.token_to_id(bos_token)]
    return Tokenizer(
        backend=backend,
        add_bos=bool(add_bos),
        bos_token=bos_token,
        eos_token=eos_token,
        stop_ids=_stop_ids(backend, eos_token, config),
        chat_template=config.get("chat_template") or None,
    )


def _stop_ids(
    backend: tokenizers.Tokenizer, eos_token: str | None, config: dict[str, Any]
) -> frozenset[int]:
    """The end-of-text token, those that `config` names, and the special tokens that end a turn."""
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    names = [name for name in END_TOKENS if name in special]
    if eos_token is not None:
        names.append(eos_token)
    return frozenset([*map(backend.token_to_id, names), *config["stop_token_ids"]])


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


def _read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and its configuration from a folder's files; raises InputError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        hint = (
            ": its tokenizer.model must be converted to tokenizer.json first"
            if (folder / "tokenizer.model").is_file()
            else ""
        )
        raise InputError(f"{folder} holds no tokenizer.json{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file} is not a tokenizer: {_one_line(error)}") from error
    # Whoever saved the file may have left on what cuts or fills texts to a training run's length.
    backend.no_truncation()
    backend.no_padding()

    file, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    config = _read_json(folder / "special_tokens_map.json") | _read_json(file)
    template = _read_text(folder / "chat_template.jinja")
    if template is None:
        template = _default_template(config.get("chat_template"), file)
    config["chat_template"] = template
    config["stop_token_ids"] = [
        *token_ids(config.get("stop_token_ids"), f"{file}: stop_token_ids"),
        *token_ids(_read_json(generation).get("eos_token_id"), f"{generation}: eos_token_id"),
    ]
    return backend, config


def _read_text(file: Path) -> str | None:
    """What a text file holds; None if there is no such file. Raises InputError."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {_one_line(error)}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file. Raises InputError."""
    text = _read_text(file)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        # Half of a surrogate pair, which JSON can spell out, is in no text: this raises.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
