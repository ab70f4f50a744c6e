"""A small real model finds a number hidden in a long real text, by wave attention.

    python scripts/demo.py

The text is Python's own manual, which every Python holds. Exit status 1 if the number is not found.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path

from models.checkpoints.open import find_default_model
from models.text.tokenizer import Tokenizer, load_tokenizer
from wavejax import generate
from wavejax.evaluation import haystack

OPENING = "There is a special magic number hidden in the following text. Remember it."
NEEDLE = (
    "Remember this: the special magic number is {number}. {number} is the special magic number."
)
RETRIEVED = 256  # tokens, in each step
QUESTION = "What is the special magic number?"


def hide(number: int, tokenizer: Tokenizer, tokens: int, depth: float) -> str:
    """At least `tokens` tokens of prose with the number `depth` of the way in, and the question."""
    paragraphs, total = [], 0
    for paragraph in haystack.paragraphs():
        paragraphs.append(paragraph)
        total += len(tokenizer.encode(paragraph, add_special=False))
        if total >= tokens:
            break
    paragraphs.insert(int(depth * len(paragraphs)), NEEDLE.format(number=number))
    return "\n\n".join([OPENING, *paragraphs, QUESTION])


class Tee(io.TextIOBase):
    """Keeps what it passes on to stdout."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Keep the text and pass it on."""
        self.text += text
        return sys.__stdout__.write(text) if sys.__stdout__ else len(text)

    def flush(self) -> None:
        """Flush what was passed on."""
        if sys.__stdout__:
            sys.__stdout__.flush()


def main() -> int:
    """Return the exit status: 0 if the answer names the number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3500, help="least length of the text")
    parser.add_argument("--depth", type=float, default=0.4, help="where the number stands, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the number")
    arguments = parser.parse_args()

    number = random.Random(arguments.seed).randrange(10**6, 10**7)
    model = find_default_model()
    tokenizer = load_tokenizer(model)
    text = hide(number, tokenizer, arguments.tokens, arguments.depth)
    length = len(tokenizer.encode(text, add_special=False))
    print(
        f"{number} is hidden in {length} tokens of text; {model.stem}, which retrieves {RETRIEVED} "
        f"of them in each step, is asked: {QUESTION}"
    )

    answer = Tee()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompt.txt")
        file.write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(answer):
            asked = ["--model", str(model), "--prompt-file", str(file), "--max-new-tokens", "32"]
            # By default so short a text would be read as a whole.
            status = generate.main([*asked, "--min-retrieved-tokens", str(RETRIEVED)])
    if status:
        return status
    found = str(number) in answer.text
    print(f"{number}: {'found' if found else 'not found'}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
