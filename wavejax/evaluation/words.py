"""The English word lists that RULER draws keys and words from."""

import functools
from typing import Literal

from models.errors import InputError

Kind = Literal["nouns", "adjectives", "verbs"]


@functools.cache
def word_list(kind: Kind) -> tuple[str, ...]:
    """All words of one kind, sorted; InputError if the package that has them is not installed."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise InputError(
            "this task needs word lists; run: pip install 'wavejax[evaluation]'"
        ) from error
    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))
