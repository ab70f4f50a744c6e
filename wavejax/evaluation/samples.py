"""Samples: prompts sized to a budget of tokens, and how an answer to one is scored.

As RULER sizes and scores them (arXiv 2404.06654): the budget counts the prompt, chat template and
answer prefix included, and the tokens to generate.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from models.errors import InputError
from models.text.tokenizer import Tokenizer
from wavejax.evaluation.haystack import Haystack

# Of the code that makes samples: to be raised when it makes others of the same settings.
GENERATOR = 1

# What a chat template is told for today, so that a sample of tomorrow is the same. Of a string
# without braces `format` gives itself, whatever it is called with.
FIXED_DATE = '{% set strftime_now = "26 Jul 2024".format %}'


@dataclasses.dataclass(frozen=True)
class Turn:
    """A user's message, and how the answer to it begins; all of it in a worked example."""

    message: str
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample before it is encoded.

    Attributes:
        turns: the last one is the question.
        references: the strings that a right answer holds.
    """

    turns: tuple[Turn, ...]
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and what is to be done with it.

    Attributes:
        tokens: the prompt's token ids.
        new_tokens: how many tokens to generate.
        references: the strings that the answer should contain; none where it is not scored.
        continuation: the text's own next tokens, for teacher forcing; empty where full attention's
            answer is forced.
    """

    tokens: tuple[int, ...]
    new_tokens: int
    references: tuple[str, ...] = ()
    continuation: tuple[int, ...] = ()

    @property
    def sha256(self) -> str:
        """Its first 16 digits, of all that the sample is: what tells it from others."""
        whole = (self.tokens, self.new_tokens, self.references, self.continuation)
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What samples are made of.

    Attributes:
        tokenizer: the model's, in whose tokens lengths are counted; its chat template is given a
            fixed date.
        haystack: prose.
    """

    tokenizer: Tokenizer
    haystack: Haystack

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if template is not None and not template.startswith(FIXED_DATE):
            dated = dataclasses.replace(self.tokenizer, chat_template=FIXED_DATE + template)
            object.__setattr__(self, "tokenizer", dated)

    def encode(self, turns: tuple[Turn, ...]) -> list[int]:
        """Token ids of the turns, each in the model's chat template, if it has one."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            text = "".join(turn.message + turn.answer for turn in turns)
            return tokenizer.encode(text, add_special=True)
        ids: list[int] = []
        for turn in turns:
            # Each text by itself: none of it is to become a mark of the template.
            message = [{"role": "user", "content": turn.message}]
            asked = tokenizer.encode_chat(message)
            if ids and asked[0] == tokenizer.bos_id and not self._writes_bos(message):
                asked = asked[1:]
            ids += asked + tokenizer.encode(turn.answer, add_special=False)
        return ids

    def _writes_bos(self, messages: list[dict[str, str]]) -> bool:
        """Whether the template begins with the beginning of a text, and so in every turn."""
        bos = self.tokenizer.bos_token
        return bos is not None and self.tokenizer.chat_text(messages).startswith(bos)


@runtime_checkable
class Task(Protocol):
    """A kind of sample. Hashable.

    Attributes:
        new_tokens: how many tokens to generate.
        sampled: full attention's answer is drawn at temperature 1, not greedily.
    """

    @property
    def new_tokens(self) -> int:
        """How many tokens to generate."""

    @property
    def sampled(self) -> bool:
        """Whether full attention's answer is drawn."""

    def sample(self, material: Material, length: int, seed: int, index: int) -> Sample:
        """Make the sample of this number; the same arguments give the same sample.

        Raises:
            InputError: no sample of the task is as short as `length`, or the prose is too short.
        """


@dataclasses.dataclass(frozen=True)
class DraftedTask:
    """A task whose samples are sized by how much of something they hold.

    Subclasses say what: `draft` makes a text with so much of it.
    """

    sampled = False

    @property
    def new_tokens(self) -> int:
        """How many tokens to generate."""
        raise NotImplementedError

    def step(self, length: int) -> int:
        """Return the least amount, and what is taken away at a time.

        It is taken away from a sample that is too long.
        """
        raise NotImplementedError

    def most(self) -> int:
        """Return the largest amount that there is."""
        return 2**31

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return a text with so much in it, for a budget of `length` tokens."""
        raise NotImplementedError

    def sample(self, material: Material, length: int, seed: int, index: int) -> Sample:
        """Make the sample, as of `Task`.

        The amount is searched once a length. A sample that it makes too long is shrunk until it
        fits.
        """
        amount, step = _amount(self, material, length, seed), self.step(length)
        while amount >= step:
            rng = random.Random(f"{self} {seed} {length} {index}")
            draft = self.draft(amount, length, rng, material)
            tokens = material.encode(draft.turns)
            if len(tokens) + self.new_tokens <= length:
                return Sample(tuple(tokens), self.new_tokens, draft.references)
            # By RULER's step; finer where one step would leave less than the least.
            amount -= step if amount >= 2 * step else max(1, step // 10)
        raise _too_short(self, length)


@functools.cache
def _amount(task: DraftedTask, material: Material, length: int, seed: int) -> int:
    rng = random.Random(f"{seed} {length} amount")
    room = length - task.new_tokens

    def tokens(amount: int) -> int:
        return len(material.encode(task.draft(amount, length, rng, material).turns))

    amount = largest(tokens, room, task.step(length), task.most())
    if amount == task.most():
        raise InputError(
            f"{type(task).__name__} has not the words for samples of {length} tokens: give a "
            "smaller length"
        )
    return amount


def largest(tokens: Callable[[int], int], room: int, least: int, most: int) -> int:
    """Return the largest amount, from `least` to `most`, that makes at most `room` tokens.

    By doubling, then by halving; `least` if none does.
    """
    if tokens(least) > room:
        return least
    low, high = least, min(2 * least, most)
    while tokens(high) <= room:
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    return low


def _too_short(task: DraftedTask, length: int) -> InputError:
    return InputError(
        f"{type(task).__name__} has no sample of {length} tokens, {task.new_tokens} of them "
        "generated: give a larger length"
    )


def score(references: tuple[str, ...], answer: str) -> float:
    """Return the share of the reference strings found in the answer, whatever their case."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)
