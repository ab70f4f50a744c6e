"""The keywords of `BatchEngine`, for those that hand them on."""

from collections.abc import Callable
from typing import TypedDict

from models.text.tokenizer import Tokenizer


class EngineOptions(TypedDict, total=False):
    """See `BatchEngine`."""

    tokenizer: Tokenizer | None
    memory: int | None
    reuse_slots: bool
    max_stall_ms: float
    queue_limit: int
    short_tokens: int
    most_passes: int
    steps: int
    clock: Callable[[], float]
