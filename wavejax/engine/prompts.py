"""The lengths that prompts are padded to, the room for answers, and what prompts share."""

import numpy as np
from jaxtyping import Int

SMALLEST_BUCKET = 128
SMALLEST_ROOM = 64


def bucket(tokens: int) -> int:
    """Return the padded length of a prompt: prompts of one bucket share compiled programs.

    1, 1.25, 1.5, 1.75 times a power of two: at most a quarter more than the prompt.
    """
    return rounded_up(tokens, SMALLEST_BUCKET)


def least_of_bucket(tokens: int) -> int:
    """Return the fewest tokens of a prompt that is padded as one of so many tokens is."""
    padded = bucket(tokens)
    return 1 if padded == SMALLEST_BUCKET else padded - _quarter(padded) + 1


def answer_room(new_tokens: int) -> int:
    """Return the room made for so many new tokens: requests of one room share compiled programs.

    As a prompt's bucket, but of at least 64; none where none is asked for.
    """
    return rounded_up(new_tokens, SMALLEST_ROOM) if new_tokens else 0


def common_prefix(kept: Int[np.ndarray, "_kept"], prompt: Int[np.ndarray, "_prompt"]) -> int:
    """Count the tokens that two sequences begin with alike."""
    shorter = min(len(kept), len(prompt))
    different = np.flatnonzero(kept[:shorter] != prompt[:shorter])
    return int(different[0]) if different.size else shorter


def rounded_up(tokens: int, least: int) -> int:
    """Round up to 1, 1.25, 1.5 or 1.75 times a power of two, and to `least`, 4 or more."""
    if tokens <= least:
        return least
    quarter = _quarter(tokens)
    return -(-tokens // quarter) * quarter


def _quarter(tokens: int) -> int:
    """Return a quarter of the power of two below."""
    return 2 ** ((tokens - 1).bit_length() - 3)
