"""A call of the step: who sat where, and its tokens once they are there."""

import dataclasses
from collections.abc import Hashable, Sequence

from jax import Array

from wavejax.engine.batching import watching
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.request import TokenLogprobs
from wavejax.engine.state import NO_TOKEN


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the step whose tokens were not looked at yet.

    Attributes:
        seats: who sat where, and is to have its tokens: nobody, where they were drawn ahead.
        tokens: `[steps, batch]` int32.
        scores: log-probabilities of the call's one step, if anyone asked for them.
        at: when it was made, by the engine's clock.
        key: its kind, for its pace.
        steps: of it.
    """

    seats: tuple[Answer | None, ...]
    tokens: Array
    scores: watching.Scores | None
    at: float
    key: Hashable
    steps: int


def hand_out(answer: Answer, tokens: Sequence[int], told: TokenLogprobs | None, now: float) -> None:
    """Give an answer its tokens of a call, up to its end."""
    for token in tokens:
        if token == NO_TOKEN:
            # Its room holds what it may want, so it is not full.
            answer.end("not finite", now)
        else:
            if answer.request.constraint is not None:
                answer.request.constraint.accept(token)
            answer.take(token, told, now)
        if answer.has_ended():
            return
