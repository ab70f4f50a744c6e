"""How a text is cut before byte pairs are merged, by the names that GGUF files use.

The patterns are part of the models: other cuts give other tokens than those that a model was
trained on. A name is listed only where its pattern is known to be the one that the model's authors
published.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

# GPT-2's pattern is the library's own.
_GPT2: str | None = None
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Digits first, so that no space or sign is cut together with them.
_MINICPM5 = (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_REST}")
# Llama 3's, with spaces counted off in powers of two.
_JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s"
)


def _cased(ending: str, digits: str) -> str:
    """Words as tekken and GPT-4o cut them, at changes of case; `ending` may follow a word."""
    start = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        rf"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_DIGIT = r"\p{N}"
# Letters that have a case, but for those that Unicode gained or cased after the model was made.
_CASED_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^"
    "\u0560-\u0588\u10c7\u10cd\u10d0-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\uab68"
    "\U00010570-\U000105bc\U00010d50-\U00010d85\U00016e40-\U00016e7f\U0001d400-\U0001d7cb"
    "\U0001df00-\U0001df2a]]"
)
_EAST_ASIAN = "[\u0800-\u9fa5\uac00-\ud7ff]+"
_KANA_AND_HAN = "[\u3040-\u30ff\u4e00-\u9fa5]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_CASED_LETTERS}+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _EAST_ASIAN,
    _DIGIT,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _KANA_AND_HAN,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = (
    rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_AYA_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"


@dataclass(frozen=True)
class PreTokenizer:
    """A way of cutting, and what goes with it.

    Attributes:
        patterns: applied one after the other, each to the pieces that the one before left; None is
            GPT-2's own.
        whole_pieces: a whole piece that is in the vocabulary is one token, whatever the merges say.
        add_bos: texts start with the beginning-of-text token unless the file says otherwise.
        composed: texts are brought into Unicode's composed form (NFC) first.
    """

    patterns: tuple[str | None, ...]
    whole_pieces: bool = False
    add_bos: bool = False
    composed: bool = False

    def build(self) -> Any:
        """Return the library's pre-tokenizer, bytes written as characters at its end."""
        steps: list[Any] = [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            if pattern is None
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns
        ]
        if self.patterns[-1] is not None:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


def _named(kind: PreTokenizer, names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), kind)


# Names that stand for the same pattern differ in what goes with it, as other runtimes read them.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named(
        PreTokenizer((_LLAMA3,), whole_pieces=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    **_named(PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    **_named(PreTokenizer(_MINICPM5, whole_pieces=True), "minicpm5"),
    **_named(PreTokenizer((_JAIS2,)), "jais-2"),
    **_named(PreTokenizer((_QWEN2,), composed=True), "qwen2 deepseek-r1-qwen"),
    **_named(PreTokenizer((_QWEN2,)), "megrez stablelm2 hunyuan solar-open kormo f2llmv2 grok-2"),
    **_named(PreTokenizer((_QWEN35,)), "qwen35"),
    **_named(PreTokenizer((_TEKKEN,), whole_pieces=True, add_bos=True), "tekken"),
    **_named(PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    **_named(PreTokenizer((_AYA_DIGITS, _GPT4O)), "tiny_aya cohere2moe"),
    **_named(PreTokenizer(_DEEPSEEK_LLM), "deepseek-llm"),
    **_named(PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    **_named(PreTokenizer(_DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    **_named(PreTokenizer((_SEED_CODER,)), "seed-coder"),
    **_named(PreTokenizer((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    **_named(PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    **_named(PreTokenizer((_BLOOM, _DIGIT)), "viking"),
    **_named(
        PreTokenizer((_DIGIT, _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    **_named(
        PreTokenizer((_GPT2,)),
        "default gpt-2 gpt2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum "
        "modern-bert exaone4 mpt olmo jais trillion granite-docling",
    ),
}
