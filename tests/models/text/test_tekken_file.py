"""tekken.json, the tokenizer file of Mistral's library, against merging by rank, straight."""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from models.errors import InputError
from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import CORPUS, SPECIAL, train


def letters() -> dict[str, int]:
    """Bytes by the letters that stand for them in byte-level vocabularies."""
    found = {}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in map(chr, range(0x800)):
        written = split.pre_tokenize_str(char)[0][0]
        found |= dict(zip(written, char.encode(), strict=True))
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found))
    return found | dict(zip(rest, sorted(set(range(256)) - set(found.values())), strict=True))


PATTERN = r"[^\W\d]+|\d| ?[^\s\w]+|\s+"


def write_tekken(folder: Path, count: int = 30, **more: Any) -> list[bytes]:
    """tekken.json of a trained vocabulary and `count` control tokens; returns what is ranked."""
    vocab = train("tekken").get_vocab()
    byte_of = letters()
    longer = sorted((i, token) for token, i in vocab.items() if len(token) > 1)
    ranked = [bytes([byte]) for byte in range(256)]
    ranked += [bytes(byte_of[c] for c in token) for _, token in longer if token not in SPECIAL]
    # No two tokens make the first; the other is a text that is spelt as a control token.
    ranked += [b"zqx", b"[INST]"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ranked)
    ]
    unused = {"rank": len(ranked), "token_bytes": base64.b64encode(b"unused").decode()}
    config = {
        "pattern": PATTERN,
        "default_vocab_size": len(ranked) + count,
        "default_num_special_tokens": count,
        "version": "v3",
    }
    content = {"config": config, "vocab": [unused, *reversed(entries)]} | more
    (folder / "tekken.json").write_text(json.dumps(content))
    return ranked


def merge_by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, straight: the neighbours of the lowest rank merge first, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tekken_merges_by_rank(tmp_path: Path) -> None:
    ranked = write_tekken(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ranks = {token: rank for rank, token in enumerate(ranked[:-1])}
    assert (loaded.bos_token, loaded.eos_token, loaded.stop_ids) == ("<s>", "</s>", {2})

    @given(st.text("aBing 12'sé\n東[IST]", max_size=30) | st.sampled_from([*CORPUS, "zqx zqxzqx"]))
    @settings(deadline=None, max_examples=150)
    def agrees(text: str) -> None:
        pieces = re.findall(PATTERN, text)
        assert "".join(pieces) == text
        expected = [30 + i for piece in pieces for i in merge_by_rank(piece.encode(), ranks)]
        ids = loaded.encode(text, add_special=True)
        assert ids == [1, *expected]
        assert loaded.decode(ids) == text

    agrees()
    ids = loaded.encode("[INST]a[/INST]</s>", add_special=False, control_tokens=True)
    assert [ids[0], *ids[-2:]] == [3, 4, 2]
    assert min(loaded.encode("[INST]a[/INST]</s>", add_special=False)) >= 30


def test_tekken_names_its_control_tokens(tmp_path: Path) -> None:
    named = [
        {"rank": 0, "token_str": "<unk>", "is_control": True},
        {"rank": 1, "token_str": "<s>", "is_control": True},
        {"rank": 2, "token_str": "</s>", "is_control": True},
        {"rank": 3, "token_str": "[THINK]", "is_control": False},
    ]
    write_tekken(tmp_path, count=6, special_tokens=named)
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode("[THINK]<SPECIAL_5></s>", add_special=False, control_tokens=True)
    assert ids == [3, 5, 2]
    assert loaded.decode(ids) == "[THINK]"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"config": {}, "vocab": []},
        {"config": 5},
        {
            "config": {
                "pattern": "(",
                "default_vocab_size": 1,
                "default_num_special_tokens": 0,
            },
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
        },
        {
            "config": {"pattern": "a", "default_vocab_size": 9, "default_num_special_tokens": 2},
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
        },
    ],
)
def test_damaged_tekken(tmp_path: Path, content: Any) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tekken\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
