"""Key-value retrieval: one value of a JSON object of random UUIDs (after arXiv 2307.03172)."""

import dataclasses
import json
import random

from wavejax.evaluation.niah import random_uuid
from wavejax.evaluation.samples import Draft, DraftedTask, Material, Turn

MESSAGE = (
    "Here is a JSON object. Remember which value each key has.\n\n{pairs}\n\n"
    'What is the value of the key "{key}"?'
)
PREFIX = ' The value of the key "{key}" is "'


@dataclasses.dataclass(frozen=True)
class KeyValueRetrieval(DraftedTask):
    """One key of many is asked for; nothing but its own characters tells it from the others."""

    new_tokens: int = 64

    def step(self, length: int) -> int:
        """Pairs."""
        return 5

    def draft(self, amount: int, length: int, rng: random.Random, material: Material) -> Draft:
        """Return an object of so many pairs, and the question."""
        pairs = {random_uuid(rng): random_uuid(rng) for _ in range(amount)}
        key = rng.choice(list(pairs))
        message = MESSAGE.format(pairs=json.dumps(pairs, indent=0), key=key)
        return Draft((Turn(message, PREFIX.format(key=key)),), (pairs[key],))
