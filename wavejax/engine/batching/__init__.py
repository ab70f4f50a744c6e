"""Continuous batching: requests join and leave slots between calls of one compiled step.

Plain Python around the compiled programs of `wavejax.engine`; no server. `BatchEngine` is the way
in, `wavejax.batch_engine` makes one of a loaded model.
"""

from wavejax.engine.batching.engine import BatchEngine
from wavejax.engine.batching.handle import Handle
from wavejax.engine.batching.request import (
    Completion,
    Constraint,
    EngineClosed,
    Event,
    FinishReason,
    Kept,
    Piece,
    Progress,
    QueueFull,
    Request,
    TokenLogprobs,
    Usage,
)
from wavejax.engine.batching.rooms import Room
from wavejax.engine.batching.stats import Stats

__all__ = [
    "BatchEngine",
    "Completion",
    "Constraint",
    "EngineClosed",
    "Event",
    "FinishReason",
    "Handle",
    "Kept",
    "Piece",
    "Progress",
    "QueueFull",
    "Request",
    "Room",
    "Stats",
    "TokenLogprobs",
    "Usage",
]
