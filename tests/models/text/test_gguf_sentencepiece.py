"""SentencePiece's tokenizers of tiny GGUF files, as Llama 2 has them, against its own rule."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.sentencepiece_bpe import merges_from_scores
from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import SPM_SCORES, SPM_TOKENS, write_sentencepiece


def merge_by_score(text: str) -> list[int]:
    """SentencePiece's own rule, straight: merge the best-scored neighbours, leftmost first."""
    vocab = {token: index for index, token in enumerate(SPM_TOKENS)}
    parts = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [
            (-SPM_SCORES[vocab[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in vocab
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [3 + byte for byte in part.encode()]
    return ids


@given(st.text("the inga é東", max_size=30))
@settings(deadline=None, max_examples=100)
def test_sentencepiece_merges_by_score(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "spm.gguf"
    if not path.exists():
        write_sentencepiece(path)
    loaded = load_tokenizer(path)
    ids = loaded.encode(text, add_special=True)
    assert ids == [1, *merge_by_score(text)]
    assert loaded.decode(ids) == text
    stream = loaded.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_sentencepiece_flags(tmp_path: Path) -> None:
    loaded = load_tokenizer(
        write_sentencepiece(tmp_path / "m.gguf", add_bos_token=False, add_space_prefix=False)
    )
    assert loaded.encode("the", add_special=True) == [SPM_TOKENS.index(t) for t in ("t", "he")]
    assert loaded.decode(loaded.encode(" the", add_special=True)) == " the"
    assert loaded.stop_ids == {2}


def test_merges_from_scores() -> None:
    assert merges_from_scores(["a", "b", "ab", "aab", "aa"], [0.0, 0.0, -2.0, -1.0, -3.0]) == [
        ("a", "ab"),
        ("aa", "b"),
        ("a", "b"),
        ("a", "a"),
    ]
