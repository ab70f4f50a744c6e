"""Control tokens: the marks of a model's format, which a user's text must never turn into."""

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import tokenizers

from models.errors import InputError

# Tokens that end a turn or a text, by the names that model families gave them. A chat model may
# name only one of them as its end of text, and yet end its answer with another.
END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
)
_MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_WORD = re.compile(r"\w")
_BARRED = re.compile(r"<[|｜]\S+[|｜]>")


def looks_like_marker(token: str) -> bool:
    """Whether a token reads as a mark of a format, <...> or [...], not as text or white space."""
    return _MARKER.fullmatch(token) is not None


def is_special(token: str) -> bool:
    """Whether a marker of which no file says it is left out of decoded text: <|...|> and ends are.

    Others, as <think> is, belong to what a person reads.
    """
    return token in END_TOKENS or _BARRED.fullmatch(token) is not None


class ControlTokens:
    """The control tokens of one tokenizer, and how to encode text that they are kept out of.

    These are the special added tokens, and those that look like a marker. Other added tokens are
    text, such as runs of spaces.

    Attributes:
        ids: by what is written for them.
        shown: those of them that decoded text holds, such as <think>.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        added = backend.get_added_tokens_decoder()
        control = {
            index: token
            for index, token in added.items()
            if token.special or looks_like_marker(token.content)
        }
        self.ids = {token.content: index for index, token in control.items()}
        self.shown = frozenset(token.content for token in control.values() if not token.special)
        # Tokens that are matched only where no letter or digit touches them.
        self._single = {token.content for token in control.values() if token.single_word}
        self._backend = backend
        self._shielded: tokenizers.Tokenizer | None = None
        # They may then be matched in texts that do not spell them letter by letter.
        self._normalized = backend.normalizer is not None and any(
            token.normalized for token in control.values()
        )
        # No text holds these but by having read them here.
        nonce = secrets.token_hex(8)
        self._names = {text: f"\ue000{nonce}.{i:x}\ue001" for text, i in self.ids.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def starts(self, text: str, *, answer: bool) -> list[int]:
        """Where `text` spells control tokens, overlapping ones too, in order.

        answer: it is the model's own, in which shown ones are what the model wrote.
        """
        found = set()
        for token in self.ids.keys() - self.shown if answer else self.ids:
            start = text.find(token)
            while start >= 0:
                found.add(start)
                start = text.find(token, start + 1)
        return sorted(found)

    def leading(self, text: str) -> int | None:
        """Return the id of the control token that `text` begins with, after white space.

        Return None where it begins with none.
        """
        found = self._pattern.match(text.lstrip())
        return None if found is None else self.ids[found[0]]

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text`, none of them a control token."""
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        if not self._normalized and set(self.ids.values()).isdisjoint(ids):
            return ids  # as nearly always, and without the shielded copy
        return self._encode_shielded(text)

    def encode_marked(self, text: str, masked: dict[int, str]) -> list[int]:
        """Ids of a text that spells control tokens, and of which parts are a user's.

        masked: the characters that stand for others in the user's parts, as `str.translate` has
            them, so that what these spell is seen not to be a control token.
        """
        if not masked and not self._normalized:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return self._encode_shielded(self._pattern.sub(self._name, text).translate(masked))

    def _name(self, found: re.Match[str]) -> str:
        text, around = found[0], found.string[found.start() - 1 : found.start()]
        around += found.string[found.end() : found.end() + 1]
        is_text = text in self._single and _WORD.search(around)
        return text if is_text else self._names[text]

    def _encode_shielded(self, text: str) -> list[int]:
        if self._shielded is None:
            self._shielded = self._rename()
        return list(self._shielded.encode(text, add_special_tokens=False).ids)

    def _rename(self) -> tokenizers.Tokenizer:
        """Return the tokenizer with other names for its control tokens, all else being equal.

        The text is then cut, normalised and merged in one go, as it is where nothing is spelt out.
        """
        names = self._names
        content = json.loads(self._backend.to_str())
        content["post_processor"] = None
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
        else:  # [token, score], the index being the id
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            prefix = len(model.get("continuing_subword_prefix") or "")
            model["merges"] = [
                pair for pair in model["merges"] if not _makes_any(pair, prefix, names)
            ]
        shielded = tokenizers.Tokenizer.from_str(json.dumps(content))
        for text, index in self.ids.items():
            if shielded.token_to_id(names[text]) != index:
                raise InputError(
                    f"the tokenizer's control token {text!r} cannot be told from text; allow "
                    "control tokens in texts, or keep it out of the prompt"
                )
        return shielded


def _makes_any(pair: Any, prefix: int, tokens: Iterable[str]) -> bool:
    """Whether a merge takes or makes one of `tokens`."""
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left in tokens or right in tokens or left + right[prefix:] in tokens
