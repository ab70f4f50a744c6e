"""Needles in a haystack, as RULER words them (arXiv 2404.06654, appendix B; NVIDIA/RULER)."""

import dataclasses
import random
import uuid
from typing import Literal

from wavejax.evaluation.haystack import sentences
from wavejax.evaluation.samples import Draft, DraftedTask, Material, Turn
from wavejax.evaluation.words import word_list

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
SEVERAL_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
# Needles in prose stand at depths drawn without repetition from these percentages.
DEPTHS = [round(100 * i / 39) for i in range(40)]

Kind = Literal["words", "numbers", "uuids"]


@dataclasses.dataclass(frozen=True)
class NeedleTask(DraftedTask):
    """One kind of needle task.

    Attributes:
        haystack: what the needles are hidden in: one repeated line, prose, or other needles.
        key_kind, value_kind: what keys and values are.
        keys: keys in the text; `queries` of them are asked for.
        values: values of each key.
        queries: keys asked for.
        new_tokens: how many tokens to generate.
    """

    haystack: Literal["noise", "prose", "needles"] = "prose"
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    new_tokens: int = 128

    def step(self, length: int) -> int:
        """Words of prose, or lines. RULER's numbers, and a tenth of its words below 4096 tokens."""
        if self.haystack == "prose":
            return 500 if length >= 4096 else 50
        return 25 if length >= 4096 else 5

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return a text of so many words or lines, and the question."""
        values: dict[str, list[str]] = {}
        while len(values) < self.keys:
            values[_draw(self.key_kind, rng)] = [
                _draw(self.value_kind, rng) for _ in range(self.values)
            ]
        needles = [
            NEEDLE.format(kind=self.value_kind, key=key, value=value)
            for key, those in values.items()
            for value in those
        ]
        rng.shuffle(needles)
        context = self._hide(needles, amount, rng, material)
        asked = rng.sample(list(values), self.queries)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        one = self.values * self.queries == 1
        words = {
            "kind": self.value_kind.removesuffix("s") if one else self.value_kind,
            "query": query,
        }
        message = (ONE if one else SEVERAL).format(context=context, **words)
        prefix = (ONE_PREFIX if one else SEVERAL_PREFIX).format(**words)
        references = tuple(value for key in asked for value in values[key])
        return Draft((Turn(message, prefix),), references)

    def _hide(self, needles: list[str], amount: int, rng: random.Random, material: Material) -> str:
        if self.haystack == "prose":
            lines = sentences(material.haystack.take(amount))
            depths = sorted(rng.sample(DEPTHS, len(needles)), reverse=True)
            places = [len(lines) * depth // 100 for depth in depths]
        else:
            lines = [self._line(rng) for _ in range(amount)]
            places = sorted(rng.sample(range(amount), len(needles)), reverse=True)
        # From the last place on, so that an insertion moves no place still to come.
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return (" " if self.haystack == "prose" else "\n").join(lines)

    def _line(self, rng: random.Random) -> str:
        if self.haystack == "noise":
            return NOISE
        key, value = _draw(self.key_kind, rng), _draw(self.value_kind, rng)
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return random_uuid(rng)
    return f"{rng.choice(word_list('adjectives'))}-{rng.choice(word_list('nouns'))}"


def random_uuid(rng: random.Random) -> str:
    """Return a random UUID, version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
