"""What a slot still holds of an answer that has left it, until the next prompt takes the slot."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from wavejax.attention import appended
from wavejax.attention.protocol import AnyAttention
from wavejax.engine.batching.admission import parks, reused_by
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.request import FinishReason, Request
from wavejax.engine.interface import Engine
from wavejax.engine.prompts import common_prefix
from wavejax.engine.state import DecodeState

# How an answer may have ended whose tokens another prompt may begin with.
_SOUND: tuple[FinishReason | None, ...] = ("stop", "stop_string", "length", "interrupted")


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
    """A sequence that nobody goes on with yet.

    Attributes:
        answer: that left; its last tokens may not have come.
        limits: `[3]` int32: the fewest tokens that it can be cut to, those that it holds, and those
            that there is room for yet.
        number: higher than of those that left before.
    """

    answer: Answer
    limits: Int[Array, "3"]
    number: int

    def reused(self, request: Request) -> int:
        """Count the tokens of a prompt that need not be read: half of it at least, or none.

        Waits for the calls that the answer was in. None where it cannot be cut to them, where there
        is no room for the rest and the answer, or where something else saves as many.
        """
        if self.answer.reason not in _SOUND:
            return 0
        prompt: Any = request.prompt
        least, length, room = np.asarray(self.limits).tolist()
        if len(prompt) + request.max_new_tokens > length + room:
            return 0
        own: Any = self.answer.request.prompt
        held = np.concatenate([own, np.asarray(self.answer.token_ids, own.dtype)])
        # The last one is read anew: it says what comes next.
        alike = min(common_prefix(held, prompt), length, len(prompt) - 1)
        saves = alike >= max(least, 1) and 2 * alike >= len(prompt)
        return alike if saves and alike > reused_by(request) else 0


def ended(
    engine: Engine, state: DecodeState | None, slot: int, answer: Answer, number: int
) -> Ended | None:
    """Note what a slot holds whose answer leaves it; does not wait. None where it holds nothing.

    Args:
        engine: of the state.
        state: after all calls that the answer was in.
        slot: the answer's.
        answer, number: as of `Ended`.
    """
    if state is None or not parks(engine.attention):
        return None
    arrays = engine.arrays_of(state.attention_state)
    if any(isinstance(x, Array) and x.is_deleted() for x in jax.tree.leaves(arrays)):
        return None
    return Ended(answer, _limits(engine.attention, arrays, jnp.int32(slot)), number)


@functools.partial(jax.jit, static_argnums=0)
def _limits(attention: AnyAttention, state: Any, slot: Array) -> Array:
    found = (
        appended.fewest_tokens(attention, state),
        attention.lengths(state),
        attention.remaining(state),
    )
    return jnp.stack([each[slot] for each in found])
