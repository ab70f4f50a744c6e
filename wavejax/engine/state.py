"""The state of a batch of sequences that are being generated."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from wavejax._pytree import state as pytree
from wavejax.engine.penalties import TokenCounts
from wavejax.engine.sampling import SamplingSettings

NO_TOKEN = -1  # What a sequence yields once it has stopped.


@pytree
class DecodeState:
    """A batch of sequences being generated.

    Attributes:
        attention_state: the attention's, as the engine holds it: with `fetch="staged"` a
            `wavejax.engine.staged.StagedState`, else what `attention.init_state` makes.
        logits: `[batch, vocab]` float32, of the next token.
        finished: `[batch]` bool, sequences that yield no more tokens: they have yielded a stop
            token, their room is full, or their logits were not finite.
        seed: `[batch]` int32, of each one's noise.
        step: `[batch]` int32, tokens that each one has generated so far; for `seed` and `step` a
            scalar stands for all.
        sequences: `[batch]` int32, the numbers by which each one's noise is keyed; 0, 1, 2, ...
            where left out.
        nonfinite: `[batch]` bool, sequences that ended because NaN or infinity was among their
            logits; none where left out.
        counts: what each has said; None where no penalty asks for it.
        sampling: how each one's tokens are drawn; the most probable ones where left out.
        prompt_room: int32 scalar, tokens of the longest prompt that a slot has room for, padding
            included; None of a state that has no slots.
        shortest_prompt: int32 scalar, tokens of the shortest prompt that a slot is made for; 1
            where left out.
    """

    attention_state: object
    logits: Array
    finished: Array
    seed: Array
    step: Array
    sequences: Array = None  # type: ignore[assignment]
    nonfinite: Array = None  # type: ignore[assignment]
    counts: TokenCounts | None = None
    sampling: SamplingSettings = SamplingSettings()
    prompt_room: Array | None = None
    shortest_prompt: Array | None = None

    def __post_init__(self) -> None:
        batch = self.finished.shape[0]
        for name, dtype, make in (
            ("sequences", jnp.int32, jnp.arange),
            ("nonfinite", bool, jnp.zeros),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, make(batch, dtype=dtype))
        for name in ("seed", "step"):
            value = getattr(self, name)
            if value.ndim == 0:
                object.__setattr__(self, name, jnp.full(batch, value))


def commit(tree: Any) -> Any:
    """Ties arrays to the device they are on, as what a compiled call returns already is.

    Otherwise a program compiles twice: for the first call's arrays, and for its own results.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def was_donated(tree: Any) -> bool:
    """Whether an array of a tree was given to a call that used it up."""
    return any(
        isinstance(leaf, Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(tree)
    )
