"""Variable tracking, as RULER words it (arXiv 2404.06654, appendix B; NVIDIA/RULER)."""

import dataclasses
import itertools
import random
import string

from wavejax.evaluation.niah import NOISE
from wavejax.evaluation.samples import Draft, DraftedTask, Material, Turn, largest

MESSAGE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
EXAMPLE_TOKENS = 500
EXAMPLE_STEP = 5


@dataclasses.dataclass(frozen=True)
class VariableTracking(DraftedTask):
    """One chain of assignments among lines of noise; an example stands before it.

    Attributes:
        hops: assignments from one variable to the next.
        new_tokens: how many tokens to generate.
    """

    hops: int = 4
    new_tokens: int = 30

    def step(self, length: int) -> int:
        """Lines of noise: RULER's numbers."""
        return 10 if length >= 4096 else 5

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return an example, then so many lines of noise with a chain in them."""

        def example_of(lines: int) -> str:
            message, prefix, names = self._chain(lines, 3, rng)
            return f"{message}{prefix} {' '.join(names)}\n\n"

        def example_tokens(lines: int) -> int:
            return len(material.tokenizer.encode(example_of(lines), add_special=False))

        lines = largest(example_tokens, EXAMPLE_TOKENS, EXAMPLE_STEP, EXAMPLE_TOKENS)
        example = example_of(lines)
        message, prefix, names = self._chain(amount, 5, rng)
        return Draft((Turn(example + message, prefix),), tuple(names))

    def _chain(self, lines: int, letters: int, rng: random.Random) -> tuple[str, str, list[str]]:
        """Return a question, how its answer begins, and the variables.

        Their names have so many letters.
        """
        names: dict[str, None] = {}
        while len(names) <= self.hops:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        chain = list(names)
        value = str(rng.randrange(10000, 99999))
        statements = [f"VAR {chain[0]} = {value}"]
        # RULER writes a blank after all but the first.
        statements += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(chain)]
        context = [NOISE] * lines
        places = sorted(rng.sample(range(lines), len(statements)))
        for nth, (place, statement) in enumerate(zip(places, statements, strict=True)):
            context.insert(place + nth, statement)
        message = MESSAGE.format(context="\n".join(context), value=value)
        return message, PREFIX.format(count=len(chain), value=value), chain
