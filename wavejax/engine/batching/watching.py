"""Watched steps: log-probabilities of what came, and constraints on what may come."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.request import MOST_LOGPROBS, TokenLogprobs
from wavejax.engine.state import DecodeState

FORBIDDEN = -1e30  # A logit: finite, for one that is not ends a sequence.


class Scores(NamedTuple):
    """Log-probabilities of one step.

    Attributes:
        own: `[batch]` float32, of the token that came.
        top: `[batch, most]` float32, the largest, the best first.
        ids: `[batch, most]` int32, whose they are.
    """

    own: Array
    top: Array
    ids: Array


def allowed(answer: Answer, vocab: int) -> np.ndarray:
    """Ask what an answer's constraint allows next: `[vocab]` bool.

    Raises:
        ValueError: nothing, or it is no such array. Whatever the constraint raises.
    """
    assert answer.request.constraint is not None
    mask = np.asarray(answer.request.constraint.allowed())
    if mask.shape != (vocab,) or mask.dtype != bool:
        raise ValueError(
            f"a constraint allows {mask.dtype}{list(mask.shape)}; it must be bool[{vocab}]"
        )
    if not mask.any():
        raise ValueError("a constraint allows no token")
    return mask


def ask(
    seats: Sequence[Answer | None], vocab: int, now: float
) -> tuple[dict[int, np.ndarray], list[Answer]]:
    """Ask, by slot, what constraints allow; and list the answers that ended: theirs failed."""
    found: dict[int, np.ndarray] = {}
    ended: list[Answer] = []
    for slot, answer in enumerate(seats):
        if answer is not None and answer.request.constraint is not None:
            try:
                found[slot] = allowed(answer, vocab)
            except Exception as error:
                answer.end("error", now, error)
                ended.append(answer)
    return found, ended


def enter(state: DecodeState, masks: Mapping[int, np.ndarray]) -> tuple[Array, DecodeState]:
    """Take the logits out for `score`, and forbid what constraints do.

    Args:
        state: to draw from.
        masks: by slot, what is allowed: `[vocab]` bool.

    Returns:
        the logits `[batch, vocab]` as the model made them, and the state to draw from.
    """
    logits = jnp.copy(state.logits)  # the state's own are donated
    if masks:
        rows = np.ones(logits.shape, bool)
        for slot, mask in masks.items():
            rows[slot] = mask
        state = dataclasses.replace(state, logits=_forbid(state.logits, rows))
    return logits, state


def of_slot(scores: Scores | None, slot: int, answer: Answer) -> TokenLogprobs | None:
    """Return what an answer asked for of a step's scores; wait for them."""
    asked = answer.request.logprobs
    if scores is None or asked is None:
        return None
    own, top, ids = (np.asarray(x)[slot] for x in scores)
    pairs = zip(ids[:asked].tolist(), top[:asked].tolist(), strict=True)
    return TokenLogprobs(float(own), tuple(pairs))


@jax.jit
def score(logits: Array, tokens: Array) -> Scores:
    """Return the log-probabilities of one step's tokens `[batch]`, and the largest of all."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return Scores(own, *jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logprobs.shape[-1])))


@jax.jit
def _forbid(logits: Array, allowed: Array) -> Array:
    # What is not finite stays so, to end its sequence.
    return jnp.where(allowed | ~jnp.isfinite(logits), logits, FORBIDDEN)
