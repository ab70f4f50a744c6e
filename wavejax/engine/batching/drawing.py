"""Tokens that are drawn before the step that reads them is called."""

from typing import NamedTuple

from jax import Array

from wavejax.engine.interface import Engine
from wavejax.engine.state import DecodeState


class Draw(NamedTuple):
    """The next step's tokens, of one state.

    Attributes:
        state: whose logits they are drawn from.
        tokens: `[batch]` int32, what `Engine.decode_n` takes.
        shown: `[1, batch]` int32, what the answers get.
    """

    state: DecodeState
    tokens: Array
    shown: Array


def begin_draw(engine: Engine, state: DecodeState) -> Draw:
    """Let the device draw when its work before is done, and send to the host; does not wait."""
    tokens, shown = engine.first_tokens(state)
    shown.copy_to_host_async()
    return Draw(state, tokens, shown)
