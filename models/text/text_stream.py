"""Token ids to text, one token after the other, while they are generated."""

from collections.abc import Callable, Iterable

# Tokens of a prompt that a continuation is decoded after: enough to tell whether a space is due.
_CONTEXT = 8
# A character has at most four bytes, and each token at least one.
_CHARACTER = 4
_MOST_HELD = 32


class TextStream:
    """Turns token ids into text piece by piece; the pieces never hold half a character.

    `tokenizers.decoders.DecodeStream` is not used: it raises on byte sequences that are not UTF-8,
    which a model is free to generate.

    Args:
        decode: the text of ids.
        visible: whether an id has a part in decoded text.
        before: the ids that the new ones continue; their text is not given out again.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        visible: Callable[[int], bool],
        before: Iterable[int] = (),
    ):
        self._decode, self._visible = decode, visible
        # ids[:shown] have been given out, and are the context that ids[shown:] are decoded in:
        # whether a word starts with a space may depend on what stands before it.
        self._ids = [index for index in map(int, before) if visible(index)][-_CONTEXT:]
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that `token` completes: "" while a character still lacks bytes."""
        if not self._visible(int(token)):
            return ""
        self._ids.append(int(token))
        text = self._text_until(len(self._ids))
        held = len(self._ids) - self._shown
        if text and not text.endswith("\ufffd"):
            return self._give(len(self._ids), text)
        if held <= _CHARACTER:
            return ""
        # These are no character, and never will be: all is given out but what may yet begin one.
        for until in range(len(self._ids) - 1, len(self._ids) - _CHARACTER, -1):
            if self._is_border(until, text):
                return self._give(until, self._text_until(until))
        return self._give(len(self._ids), text) if held > _MOST_HELD else ""

    def flush(self) -> str:
        """Return what is left at the end: bytes that never became a character, as U+FFFD."""
        return self._give(len(self._ids), self._text_until(len(self._ids)))

    def _give(self, until: int, text: str) -> str:
        """Count ids[:until] as given out; of the older ones nothing is needed any more."""
        if text:
            self._ids, self._shown = self._ids[self._shown :], until - self._shown
        else:  # a space that the text's start swallowed: what stands before it is still needed
            self._shown = until
            dropped = max(0, until - _MOST_HELD)
            self._ids, self._shown = self._ids[dropped:], until - dropped
        return text

    def _text_until(self, until: int) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids[:until])
        if before.endswith("\ufffd") and not text.startswith(before):
            before = before.rstrip("\ufffd")  # half a character, which has become a whole one
        return text[len(before) :]

    def _is_border(self, until: int, text: str) -> bool:
        """Whether no character of `text`, all that is held, lies on both sides of ids[until]."""
        left, right = self._text_until(until), self._decode(self._ids[until:])
        rest = text[len(left) :]
        same = rest == right or rest == " " + right  # a space, which the start of a text swallows
        return bool(rest) and text.startswith(left) and same
