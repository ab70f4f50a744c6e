"""Needle-in-a-haystack tasks, in the wording of RULER (arXiv 2404.06654, appendix B)."""

import dataclasses
import random

from models.tokenizer import Tokenizer
from wavejax.evaluation.haystack import sentences

NEEDLE = "One of the special magic numbers for {key} is: {value}."
PROMPT = (
    "{some} hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{numbers} afterwards.\n{context}\nWhat {are} the special magic {numbers} for {key} mentioned "
    "in the provided text?"
)
PREFIX = " The special magic {numbers} for {key} mentioned in the provided text {are}"
ADJECTIVES = "amber brave calm dusty eager faint gentle hollow icy jolly kind lively mellow noble"
NOUNS = "anchor bridge candle desert engine forest garden harbor island jacket kettle ladder mirror"


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """One kind of needle task.

    Attributes:
        keys: needles' keys in the text; one of them is asked for.
        values: needles of the key that is asked for.
    """

    keys: int = 1
    values: int = 1


TASKS = {
    "single": NeedleTask(),
    "multikey": NeedleTask(keys=4),
    "multivalue": NeedleTask(values=4),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and what a right answer holds.

    Attributes:
        tokens: the prompt's token ids, chat template and answer prefix included.
        references: the strings that the answer should contain.
    """

    tokens: tuple[int, ...]
    references: tuple[str, ...]


def make_sample(task: NeedleTask, tokenizer: Tokenizer, tokens: int, seed: int) -> Sample:
    """Makes a prompt of at most `tokens` tokens, and at most a sentence fewer.

    Raises:
        ValueError: the needles alone take more, or the prose is too short.
    """
    rng = random.Random(seed)
    keys = [f"{a}-{n}" for a in ADJECTIVES.split() for n in NOUNS.split()]
    keys = rng.sample(keys, task.keys)
    numbers = rng.sample(range(10**6, 10**7), task.keys + task.values - 1)
    references = [str(number) for number in numbers[: task.values]]
    needles = [NEEDLE.format(key=keys[0], value=value) for value in references]
    others = zip(keys[1:], numbers[task.values :], strict=True)
    needles += [NEEDLE.format(key=key, value=value) for key, value in others]
    places = [rng.random() for _ in needles]
    prose = sentences()
    first = rng.randrange(len(prose))
    prose = prose[first:] + prose[:first]

    def encode(count: int) -> list[int]:
        lines = prose[:count]
        # From the last place on, so that an insertion moves no place still to come.
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            lines.insert(int(place * count), needle)
        return _encode(tokenizer, " ".join(lines), keys[0], task.values)

    if len(encode(0)) > tokens or len(encode(len(prose))) <= tokens:
        raise ValueError(f"no prompt of {tokens} tokens: too few for the task, or for the prose")
    low, high = 0, len(prose)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(middle)) <= tokens else (low, middle)
    return Sample(tuple(encode(low)), tuple(references))


def _encode(tokenizer: Tokenizer, context: str, key: str, values: int) -> list[int]:
    several = values > 1
    words = {
        "some": "Some special magic numbers are" if several else "A special magic number is",
        "numbers": "numbers" if several else "number",
        "are": "are" if several else "is",
        "key": key,
    }
    message = PROMPT.format(context=context, **words)
    ids = tokenizer.encode_chat([{"role": "user", "content": message}])
    return ids + tokenizer.encode(PREFIX.format(**words), add_special=False)


def score(sample: Sample, answer: str) -> float:
    """The share of the reference strings found in the answer."""
    return sum(reference in answer for reference in sample.references) / len(sample.references)
