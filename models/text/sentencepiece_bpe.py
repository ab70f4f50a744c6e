"""Byte-pair encoding as SentencePiece does it: over characters, ordered by the pieces' scores."""

from collections.abc import Collection, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers
from tokenizers.models import BPE


def sentencepiece_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: int | None,
    leading_space: bool,
    byte_fallback: bool = True,
) -> tokenizers.Tokenizer:
    """Return the tokenizer of Llama 2's kind.

    tokens: by id.
    merges: the first to apply first; see `merges_from_scores`.
    unknown: the id of characters that are in no token, where bytes do not stand for them.
    leading_space: a text begins with a space that is not written.
    byte_fallback: such characters are written as their bytes.
    """
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=vocabulary(tokens),
            merges=list(merges),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence(space_normalizers(leading_space))
    backend.decoder = space_decoder(leading_space, byte_fallback)
    return backend


def space_normalizers(leading_space: bool) -> list[Any]:
    """Write spaces as SentencePiece does, and the one that a text begins with."""
    return [normalizers.Prepend("▁")] * leading_space + [normalizers.Replace(" ", "▁")]


def space_decoder(leading_space: bool, byte_fallback: bool) -> Any:
    """Undoes `space_normalizers`, and bytes that stand for characters."""
    return decoders.Sequence(
        [decoders.Replace("▁", " ")]
        + [decoders.ByteFallback()] * byte_fallback
        + [decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * leading_space
    )


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], unmerged: Collection[int] = ()
) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies, the first to apply first.

    A token is merged from each pair of tokens that spell it. Higher scores go first; where several
    pairs spell the same token, those of lower ids do.

    unmerged: ids of tokens that text never becomes, such as control tokens.
    """
    ids = {text: i for text, i in vocabulary(tokens).items() if i not in unmerged}
    ordered = []
    for merged, index in ids.items():
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in ids and right in ids:
                ordered.append((-scores[index], index, ids[left], ids[right], left, right))
    ordered.sort()
    return [(left, right) for *_, left, right in ordered]


def vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by token; a token listed twice keeps its first id."""
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        ids.setdefault(token, index)
    return ids
