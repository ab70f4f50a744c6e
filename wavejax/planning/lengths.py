"""The longest prompt that fits, by padded lengths."""

import bisect
from collections.abc import Callable

from models.decoder import MLP_BLOCK
from wavejax.engine.prompts import SMALLEST_BUCKET, bucket

_LONGEST = 2**24  # tokens; nobody waits for more


def longest_prompt(fits: Callable[[int], bool]) -> int:
    """Return the longest padded length that fits; 0 for none."""
    buckets = _buckets()
    count = bisect.bisect_left(buckets, True, key=lambda prompt: not fits(prompt))
    longest = buckets[count - 1] if count else 0
    # Of some lengths below four of its blocks the MLP takes less at once than of shorter ones.
    uneven = buckets[count + 1 : bisect.bisect_left(buckets, 4 * MLP_BLOCK)]
    return next(filter(fits, reversed(uneven)), longest)


def _buckets() -> list[int]:
    """Return the padded lengths of prompts, rising."""
    sizes = [SMALLEST_BUCKET]
    while sizes[-1] < _LONGEST:
        sizes.append(bucket(sizes[-1] + 1))
    return sizes
