"""Draws the next token from a model's logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.errors import InputError


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; hashable, and static in `jit`.

    The distribution is softmax(logits / temperature), cut down in this order, each cut on what the
    last one left, renormalised: the `top_k` most probable tokens; the fewest most probable tokens
    that hold at least `top_p`; the tokens at least `min_p` times as probable as the most probable
    one. Of equally probable tokens the lower id comes first.

    Raises:
        InputError: a field is outside its range.
    """

    temperature: float = _setting(0.0, "0 takes the most probable token; 1 samples as trained")
    top_k: int = _setting(0, "sample among so many most probable tokens; 0: among all")
    top_p: float = _setting(1.0, "sample among the most probable tokens that hold this share")
    min_p: float = _setting(0.0, "leave out tokens less probable than this share of the best one's")

    def __post_init__(self) -> None:
        # Logits divided by less, or more, would not stay apart in float32.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0, or from 1e-6 to 1e6"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be a whole number, 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 to 1")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, and no randomness used."""
        return self.temperature == 0

    def sample(
        self, logits: Float[Array, "batch vocab"], key: PRNGKeyArray
    ) -> Int[Array, " batch"]:
        """One int32 token for each row.

        All rows use the same key, so that a prompt gets in a batch what it gets alone.
        """
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(self._sample_row, in_axes=(0, None))(logits, key)

    def _sample_row(self, logits: Float[Array, " vocab"], key: PRNGKeyArray) -> Int[Array, ""]:
        logits = logits.astype(jnp.float32) / self.temperature
        if not self.top_k and self.top_p == 1:
            # No ranking needed: spares sorting the vocabulary.
            best = jnp.max(logits)
            kept = jnp.where(logits >= best + _log(self.min_p), logits, -jnp.inf)
            return jax.random.categorical(key, kept).astype(jnp.int32)
        vocab = logits.shape[0]
        # Descending, ties by id.
        logits, tokens = jax.lax.top_k(logits, min(self.top_k or vocab, vocab))
        keep = logits >= logits[0] + _log(self.min_p)
        if self.top_p < 1:
            share = jax.nn.softmax(logits)
            # A token counts while what stands before it holds less than top_p; so one always does.
            keep &= jnp.cumsum(share) - share < self.top_p
        choice = jax.random.categorical(key, jnp.where(keep, logits, -jnp.inf))
        return tokens[choice].astype(jnp.int32)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def step_key(seed: int | Int[Array, ""], step: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of one decode step: the same for the same seed and step, whatever the batch."""
    return jax.random.fold_in(jax.random.key(seed), step)
