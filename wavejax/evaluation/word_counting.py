"""Counting words, as RULER words it (arXiv 2404.06654, appendix B; NVIDIA/RULER): CWE and FWE."""

import dataclasses
import math
import random
import string

from wavejax.evaluation.samples import Draft, DraftedTask, Material, Turn
from wavejax.evaluation.words import word_list

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON_WORDS = 10

FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
ZETA_OF_2 = math.pi**2 / 6


@dataclasses.dataclass(frozen=True)
class CommonWords(DraftedTask):
    """The ten words that stand most often in a numbered list; a worked example comes before it."""

    new_tokens: int = 120

    def step(self, length: int) -> int:
        """Different words: RULER's number."""
        return COMMON_WORDS

    def most(self) -> int:
        """Return the words that there are."""
        return len(_all_words())

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return an example, then a list with so many different words."""
        short = length < 4096
        example, common = _word_list(20 if short else 40, *((3, 1) if short else (10, 3)), rng)
        context, references = _word_list(amount, *((6, 1) if short else (30, 3)), rng)
        return Draft(
            (
                Turn(COMMON.format(context=example), f"{COMMON_PREFIX} {_number(common)}\n"),
                Turn(COMMON.format(context=context), COMMON_PREFIX),
            ),
            tuple(references),
        )


def _word_list(
    different: int, times: int, times_of_others: int, rng: random.Random
) -> tuple[str, list[str]]:
    """Return a numbered list of so many different words, and the common ones among them."""
    words = rng.sample(_all_words(), different)
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = common * times + others * times_of_others
    rng.shuffle(listed)
    return _number(listed), common


def _number(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def _all_words() -> list[str]:
    return sorted({*word_list("nouns"), *word_list("adjectives"), *word_list("verbs")})


@dataclasses.dataclass(frozen=True)
class FrequentWords(DraftedTask):
    """The three most frequent coded words of a text.

    Word k stands there about k^-2 times as often as the first, which is dots.
    """

    new_tokens: int = 50

    def step(self, length: int) -> int:
        """Words: RULER's number."""
        return (length - self.new_tokens) // 32

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return a text of about so many words, and the question."""
        vocabulary: dict[str, None] = {}
        while len(vocabulary) < max(4, (length - self.new_tokens) // 50):
            vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        words = ["...", *list(vocabulary)[1:]]
        text = []
        for rank, word in enumerate(words, 1):
            text += [word] * int(amount / (ZETA_OF_2 * rank**2))
        rng.shuffle(text)
        message = FREQUENT.format(context=" ".join(text))
        return Draft((Turn(message, FREQUENT_PREFIX),), tuple(words[1:4]))
