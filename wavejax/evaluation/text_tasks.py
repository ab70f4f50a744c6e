"""Tasks on plain prose, judged token by token: perplexity, and drift over long generations."""

import dataclasses
import random

from models.errors import InputError
from wavejax.evaluation.samples import Material, Sample


@dataclasses.dataclass(frozen=True)
class Prose:
    """Prose to go on with; its tokens are judged, and no answer is scored.

    Attributes:
        new_tokens: how many tokens are judged.
        sampled: True judges full attention's own continuation, drawn at temperature 1 (greedily a
            small model soon repeats itself); False the text's.
    """

    new_tokens: int
    sampled: bool

    def sample(self, material: Material, length: int, seed: int, index: int) -> Sample:
        """See `Task`."""
        if length <= self.new_tokens:
            raise InputError(
                f"{length} tokens have no room for a prompt and {self.new_tokens} tokens after it: "
                f"give a length above {self.new_tokens}"
            )
        rng = random.Random(f"{self} {seed} {length} {index}")
        words = material.haystack.words
        prompt_tokens = length - self.new_tokens
        # A token is hardly ever longer than a word: so many words are enough.
        if len(words) < length:
            raise _too_short(material, length)
        first = rng.randrange(len(words) - length + 1)
        text = " ".join(words[first : first + length])
        tokens = material.tokenizer.encode(text, add_special=True)[:length]
        if len(tokens) < length:
            raise _too_short(material, length)
        continuation = () if self.sampled else tuple(tokens[prompt_tokens:])
        return Sample(tuple(tokens[:prompt_tokens]), self.new_tokens, (), continuation)


def _too_short(material: Material, length: int) -> InputError:
    return InputError(
        f"the haystack {material.haystack.name} has fewer than {length} words: name more text by "
        "`haystack`"
    )
