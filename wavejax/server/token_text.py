"""One token as text and as bytes, which log-probabilities are told with."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from models.text.tokenizer import Tokenizer
from wavejax.engine.batching import Piece

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenText:
    """Texts of single tokens of one tokenizer.

    Text that is decoded token by token lacks what spans several, and some decoders drop a space
    that a text begins with. So a token's bytes are read from its entry in the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizer.backend
        self._added = {
            index: token.content
            for index, token in tokenizer.backend.get_added_tokens_decoder().items()
        }
        self._byte_of = _byte_level() if _is_byte_level(tokenizer.backend) else None

    def bytes_of(self, token: int) -> bytes | None:
        """UTF-8 of a token, or a part of it; None where the tokenizer does not have it."""
        if token in self._added:
            return self._added[token].encode()
        entry = self._backend.id_to_token(token)
        if entry is None:
            return None
        if self._byte_of is not None:
            found = [self._byte_of.get(char) for char in entry]
            return None if None in found else bytes(byte for byte in found if byte is not None)
        hexadecimal = _BYTE.match(entry)
        if hexadecimal:
            return bytes([int(hexadecimal[1], 16)])
        return entry.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Return a token's text; bytes that are no UTF-8 by themselves become U+FFFD."""
        found = self.bytes_of(token)
        return "" if found is None else found.decode(errors="replace")

    def chat_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a chat choice's `logprobs` of these pieces."""
        content = []
        for piece in pieces:
            if piece.token_id is None or piece.logprobs is None:
                continue
            entry = self._entry(piece.token_id, piece.logprobs.logprob)
            top = [self._entry(token, value) for token, value in piece.logprobs.top]
            content.append({**entry, "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion_logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        """Return a completion's `logprobs` of these pieces.

        Args:
            pieces: an answer's, or some of them.
            offset: characters of the choice's text before them.
        """
        tokens, values, tops, offsets = [], [], [], []
        for piece in pieces:
            if piece.token_id is not None and piece.logprobs is not None:
                tokens.append(self.text_of(piece.token_id))
                values.append(piece.logprobs.logprob)
                # Two tokens may have one text; the more probable one is told.
                top: dict[str, float] = {}
                for token, value in piece.logprobs.top:
                    top.setdefault(self.text_of(token), value)
                tops.append(top)
                offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = self.bytes_of(token)
        bytes_ = None if found is None else list(found)
        return {"token": self.text_of(token), "logprob": logprob, "bytes": bytes_}


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    decoder = backend.decoder
    # A sequence of decoders does not give its parts out; its text names them.
    return decoder is not None and "ByteLevel" in repr(decoder)


@functools.cache
def _byte_level() -> dict[str, int]:
    """Bytes by the characters that stand for them in a byte-level vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    found = {chr(byte): byte for byte in shown}
    return found | {chr(256 + number): byte for number, byte in enumerate(hidden)}
