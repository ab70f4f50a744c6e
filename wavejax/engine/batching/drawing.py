"""Tokens that are drawn before the step that reads them is called."""

from typing import NamedTuple

from jax import Array

from wavejax.engine.batching.levels import Level
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


class Drawing:
    """Draws the next step's tokens, when they are wanted or behind what the device does before.

    Args:
        engine: what draws.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._begun: Draw | None = None
        self._compiled: set[Level] = set()

    def behind(self, state: DecodeState, level: Level) -> None:
        """Draw when the device has done its work, and send to the host; does not wait.

        Not at a level that was not drawn at before: who calls is timed, and that would compile.
        """
        if level in self._compiled:
            self._begun = self._draw(state)

    def take(self, state: DecodeState, level: Level) -> Draw:
        """Give the tokens of a state: those of `behind`, or anew if that was another state."""
        draw, self._begun = self._begun, None
        if draw is None or draw.state is not state:
            draw = self._draw(state)
        self._compiled.add(level)
        return draw

    def forget(self) -> None:
        """Let go of what was drawn, and of its state."""
        self._begun = None

    def _draw(self, state: DecodeState) -> Draw:
        tokens, shown = self._engine.first_tokens(state)
        shown.copy_to_host_async()
        return Draw(state, tokens, shown)
