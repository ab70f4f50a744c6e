"""Prompts as the generator takes them: what they must be, and the lengths they are padded to."""

from collections.abc import Sequence

from models.errors import InputError

SMALLEST_BUCKET = 128


def bucket(tokens: int) -> int:
    """The padded length of a prompt: prompts of one bucket share compiled programs.

    1, 1.25, 1.5, 1.75 times a power of two: at most a quarter more than the prompt.
    """
    if tokens <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    quarter = 2 ** ((tokens - 1).bit_length() - 3)
    return -(-tokens // quarter) * quarter


def check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    """Raises InputError: there is no prompt, one is empty, or a token is not of `vocab`."""
    if len(prompts) == 0:
        raise InputError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty: give at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab:
                raise InputError(
                    f"prompt {number} has token {token}; the model has 0 to {vocab - 1}"
                )
