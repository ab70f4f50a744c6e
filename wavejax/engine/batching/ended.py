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
from wavejax.engine.state import DecodeState, was_donated

# How an answer may have ended whose tokens another prompt may begin with.
_SOUND: tuple[FinishReason, ...] = ("stop", "stop_string", "length", "interrupted")


@dataclasses.dataclass(eq=False)
class Ended:
    """A sequence that nobody goes on with yet.

    It keeps nothing of the request but the tokens.

    Attributes:
        prompt: token ids.
        token_ids: of the answer; its last tokens may not have come yet.
        ended_by: why the answer ended; empty until then.
        limits: `[4]` int32: the fewest tokens that it can be cut to, those that it holds, those
            that there is room for yet, and of these, those before it has to grow. A tuple once they
            were asked for.
        number: higher than of those that left before.
    """

    prompt: Int[np.ndarray, "_prompt"]
    token_ids: list[int]
    ended_by: list[FinishReason]
    limits: Int[Array, "4"] | tuple[int, ...]
    number: int

    @property
    def unusable(self) -> bool:
        """Whether nothing can go on from it: its answer failed."""
        return bool(self.ended_by) and self.ended_by[0] not in _SOUND

    def wait(self) -> tuple[int, ...]:
        """Return the limits; waits for the calls that the answer was in."""
        if not isinstance(self.limits, tuple):
            self.limits = tuple(np.asarray(self.limits).tolist())
        return self.limits

    def free_after(self, tokens: int) -> int:
        """Count the tokens that may be appended to the first `tokens` before it has to grow."""
        _, length, _, free = self.wait()
        return free + length - tokens

    def reused(self, request: Request) -> int:
        """Count the tokens of a prompt that need not be read: half of it at least, or none.

        None where the sequence cannot be cut to them, where there is no room for the rest and the
        answer, or where something else saves as many. May `wait`.
        """
        if self.unusable or not self.ended_by:
            return 0
        prompt: Any = request.prompt
        half = len(prompt) // 2
        if half < len(self.prompt) and self.prompt[half] != prompt[half]:
            return 0  # Most of those that have nothing in common, without a look at all tokens.
        held = np.concatenate([self.prompt, np.asarray(self.token_ids, self.prompt.dtype)])
        # The last one is read anew: it says what comes next.
        alike = min(common_prefix(held, prompt), len(prompt) - 1)
        if 2 * alike < len(prompt) or alike <= reused_by(request):
            return 0
        least, length, room, _ = self.wait()
        alike = min(alike, length)
        fits = len(prompt) + request.max_new_tokens <= length + room
        return alike if fits and 2 * alike >= len(prompt) and alike >= max(least, 1) else 0


def ended(
    engine: Engine, state: DecodeState | None, slot: int, answer: Answer, number: int
) -> Ended | None:
    """Note what a slot holds whose answer leaves it; does not wait. None where it holds nothing.

    Args:
        engine: of the state.
        state: after all calls that the answer was in.
        slot: the answer's.
        answer: which leaves.
        number: as of `Ended`.
    """
    if state is None or not parks(engine.attention):
        return None
    arrays = engine.arrays_of(state.attention_state)
    if was_donated(arrays):
        return None
    limits = _limits(engine.attention, arrays, np.int32(slot))
    limits.copy_to_host_async()
    prompt: Any = answer.request.prompt
    return Ended(prompt, answer.token_ids, answer.ended_by, limits, number)


@functools.partial(jax.jit, static_argnums=0)
def _limits(attention: AnyAttention, state: Any, slot: Array) -> Array:
    found = (
        appended.fewest_tokens(attention, state),
        attention.lengths(state),
        attention.remaining(state),
        appended.free_tokens(attention, state),
    )
    return jnp.stack([each[slot] for each in found])
