"""Draws the next token from a model's logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from models.errors import InputError
from wavejax.engine.checks import real_number, whole_number


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; hashable, and static in `jit`.

    The penalties come first: they change the logits (`wavejax.engine.penalties`), for greedy
    sampling too. The distribution is then softmax(logits / temperature), cut down in this
    order, each cut on what the last one left, renormalised: the `top_k` most probable tokens;
    the fewest most probable tokens that hold at least `top_p`; the tokens at least `min_p`
    times as probable as the most probable one. Of equally probable tokens the lower id comes
    first.

    Raises:
        InputError: a field is no number, or outside its range.
    """

    temperature: float = _setting(0.0, "0 takes the most probable token; 1 samples as trained")
    top_k: int = _setting(0, "sample among so many most probable tokens; 0: among all")
    top_p: float = _setting(1.0, "sample among the most probable tokens that hold this share")
    min_p: float = _setting(0.0, "leave out tokens less probable than this share of the best one's")
    repetition_penalty: float = _setting(
        1.0,
        "divide the positive logits of tokens that the prompt or the answer has by this, and "
        "multiply the negative ones; 1: off",
    )
    presence_penalty: float = _setting(
        0.0, "subtract this from the logits of tokens that the answer has, from -2 to 2; 0: off"
    )
    frequency_penalty: float = _setting(
        0.0,
        "subtract this from a token's logit each time that the answer has it, from -2 to 2; 0: off",
    )

    def __post_init__(self) -> None:
        # numpy's numbers will do; as Python's own they are hashable, and equal where they are.
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        for field in dataclasses.fields(self):
            if field.name != "top_k":
                number = real_number(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, number)
        # Logits divided by less, or more, would not stay apart in float32.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0, or from 1e-6 to 1e6"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from -2 to 2")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, and no randomness used."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether a penalty is on: then what has been said is counted (see `penalties`)."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def sample(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]
    ) -> Int[Array, " batch"]:
        """One int32 token for each row; penalties are the caller's to apply before.

        Args:
            logits: of the next token; one that is NaN is never drawn while there are others.
            keys: `[batch]`, a key of its own for each row (`step_keys`), so that a row gets what it
                gets alone, whatever stands beside it.
        """
        # To `argmax` NaN is the largest number of all.
        logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(self._sample_row)(logits, keys)

    def _sample_row(self, logits: Float[Array, " vocab"], key: Key[Array, ""]) -> Int[Array, ""]:
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


def step_key(
    seed: int | Int[Array, ""], step: int | Int[Array, ""], sequence: int | Int[Array, ""] = 0
) -> Key[Array, ""]:
    """The key of one sequence's decode step: of its seed, its number and the step, and no more.

    By Threefry, whatever JAX's default is: another generator's numbers may depend on the batch.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, sequence), step)


def step_keys(
    seed: int | Int[Array, ""], step: int | Int[Array, ""], sequences: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """`[batch]`, the keys of one decode step of these sequences; see `step_key`."""
    return jax.vmap(step_key, in_axes=(None, None, 0))(seed, step, sequences)
