"""Pre-tokenizers by their names in GGUF files: what they cut, and which stand for the same."""

from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from models.text.pre_tokenizers import PRE_TOKENIZERS
from models.text.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import CORPUS, train, write_gguf

# How each cuts this text, from its published description, worked out by hand.
TEXT = "It's 12345 naïve CamelCase漢字かな\n\n  don't! ա /x"
CUT = {
    "llama-bpe": "It|'s| |123|45| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "qwen2": "It|'s| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "tekken": "It|'s| |1|2|3|4|5| naïve| Camel|Case漢字かな|\n\n| | don|'t|!| ա| /|x",
    "gpt-4o": "It's| |123|45| naïve| Camel|Case漢字かな|\n\n| | don't|!| ա| /|x",
    "tiny_aya": "It's| |12|345| naïve| Camel|Case漢字かな|\n\n| | don't|!| ա| /|x",
    "deepseek-llm": "It|'|s| |1|2|3|4|5| na|ï|ve| CamelCase|漢字かな|\n|\n| | don|'|t|!| ա| /|x",
    "deepseek-coder": "It|'|s| |1|2|3|4|5| naïve| CamelCase|漢字かな|\n|\n| | don|'|t|!| ա| /|x",
    "deepseek-v3": "It|'s| |123|45| naïve| CamelCase|漢字かな|\n\n| | don|'t|!| ա| /|x",
    "seed-coder": "It|'s| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "bailingmoe": "It|'s| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "minicpm5": "It|'s| |123|45| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "jais-2": "It|'s| |123|45| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "qwen35": "It|'s| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n| | don|'t|!| ա| /|x",
    "gpt-2": "It|'s| 12345| naïve| CamelCase漢字かな|\n\n | don|'t|!| ա| /|x",
    "smollm": "It|'s| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n | don|'t|!| ա| /|x",
    "bloom": "It's| 12345| naïve| CamelCase漢字かな|\n\n | don't|!| ա| /x",
    "viking": "It's| |1|2|3|4|5| naïve| CamelCase漢字かな|\n\n | don't|!| ա| /x",
}


def cut(name: str, text: str) -> list[str]:
    """The pieces of a text, read back from bytes."""
    split, at, pieces = PRE_TOKENIZERS[name].build(), 0, []
    for _, (start, end) in split.pre_tokenize_str(text):
        assert start <= at
        pieces.append(text[at:end])
        at = end
    assert "".join(pieces) == text
    return pieces


@pytest.mark.parametrize("name", CUT)
def test_cuts(name: str) -> None:
    assert "|".join(cut(name, TEXT)) == CUT[name]


def test_each_pattern_is_shown_above() -> None:
    assert {PRE_TOKENIZERS[name].patterns for name in CUT} == {
        kind.patterns for kind in PRE_TOKENIZERS.values()
    }


def test_what_tells_alike_patterns_apart() -> None:
    assert cut("seed-coder", "a!\nb") == ["a", "!", "\n", "b"]
    assert cut("qwen2", "a!\nb") == ["a", "!\n", "b"]
    assert cut("bailingmoe", "a\n\nb") == ["a", "\n\n", "b"]
    assert cut("bailingmoe", "a \n\n\nb") == ["a", " \n\n\n", "b"]
    assert cut("qwen35", "हिन्दी") == ["हिन्दी"]
    assert len(cut("qwen2", "हिन्दी")) > 1
    assert cut("jais-2", "a" + " " * 7 + "b") == ["a", *["    "], *["  "], " b"]
    assert cut("deepseek-v3", "1234漢x") == ["123", "4", "漢", "x"]


def test_letters_with_a_case_of_deepseek() -> None:
    """Those that Unicode cased later are cut like letters without one."""
    pattern = PRE_TOKENIZERS["deepseek-llm"].patterns[1]
    assert pattern is not None
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    kept = "".join(piece for piece, _ in split.pre_tokenize_str("aÄǅяԱἕꙀﬁＡ𐐀" + "աაⴀꞐꬰ𝐀ªʰאا漢"))
    assert kept == "aÄǅяԱἕꙀﬁＡ𐐀"


@pytest.mark.parametrize(
    "alias, name",
    [
        *[(alias, "llama-bpe") for alias in ("llama3", "falcon3", "pixtral", "lfm2", "midm-2.0")],
        *[(alias, "llama-bpe") for alias in ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe")],
        *[(alias, "qwen2") for alias in ("megrez", "stablelm2", "hunyuan", "deepseek-r1-qwen")],
        *[(alias, "smollm") for alias in ("starcoder", "refact", "command-r", "minerva-7b")],
        *[(alias, "gpt-2") for alias in ("phi-2", "olmo", "exaone4", "trillion", "a.x-4.0")],
        *[(alias, "gpt-4o") for alias in ("llama4", "kanana2")],
        ("hunyuan-dense", "deepseek-v3"),
        ("poro-chat", "bloom"),
    ],
)
def test_aliases_cut_as_what_they_stand_for(tmp_path: Path, alias: str, name: str) -> None:
    backend = train("gpt-2")
    by_alias = load_tokenizer(write_gguf(tmp_path / "a.gguf", backend, "gpt2", alias))
    by_name = load_tokenizer(write_gguf(tmp_path / "n.gguf", backend, "gpt2", name))
    for text in [*CORPUS, TEXT, "1234567"]:
        assert cut(alias, text) == cut(name, text)
        ids = by_alias.encode(text, add_special=False)
        if PRE_TOKENIZERS[alias].whole_pieces == PRE_TOKENIZERS[name].whole_pieces:
            assert ids == by_name.encode(text, add_special=False)
        assert by_alias.decode(ids) == text
    assert by_alias.add_bos == PRE_TOKENIZERS[alias].add_bos
