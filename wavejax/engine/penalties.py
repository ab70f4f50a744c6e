"""Penalties: tokens that have been said become less probable, before anything else is done.

Counts are kept only where a penalty is on, and are part of the state: a sequence's own, whatever
stands beside it in its batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from wavejax._pytree import state as pytree


@pytree
class Penalties:
    """A batch's penalties; see `Sampler`.

    Attributes:
        repetition, presence, frequency: `[batch]` float32; 1, 0 and 0 change nothing.
    """

    repetition: Array
    presence: Array
    frequency: Array


@pytree
class TokenCounts:
    """What each sequence has said.

    Attributes:
        in_prompt: `[batch, vocab]` bool, tokens of the prompt.
        generated: `[batch, vocab]` int32, how many times each token came after it: drawn, or run
            by `Generator.force` or `feed`.
    """

    in_prompt: Array
    generated: Array


def no_counts(batch: int, vocab: int) -> TokenCounts:
    """Return counts of sequences that have no prompt yet."""
    return TokenCounts(jnp.zeros((batch, vocab), bool), jnp.zeros((batch, vocab), jnp.int32))


def count_prompts(prompts: Sequence[Int[np.ndarray, "_tokens"]], vocab: int) -> TokenCounts:
    """Return counts before the first new token."""
    in_prompt = np.zeros((len(prompts), vocab), bool)
    for row, prompt in zip(in_prompt, prompts, strict=True):
        row[prompt] = True
    return TokenCounts(jnp.asarray(in_prompt), jnp.zeros(in_prompt.shape, jnp.int32))


def count(
    counts: TokenCounts, tokens: Int[Array, " batch"], finished: Bool[Array, " batch"]
) -> TokenCounts:
    """Count one token of each sequence in that is not finished."""
    rows = jnp.arange(tokens.shape[0])
    added = counts.generated.at[rows, tokens].add(jnp.where(finished, 0, 1))
    return TokenCounts(counts.in_prompt, added)


count_step = jax.jit(count, donate_argnames="counts")


def penalised(
    penalties: Penalties, logits: Float[Array, "batch vocab"], counts: TokenCounts
) -> Float[Array, "batch vocab"]:
    """Logits with each sequence's penalties, float32.

    First repetition: a logit of a token that the prompt or the answer has is divided by the penalty
    where it is positive, and multiplied where it is not (CTRL, arXiv 1909.05858, section 4.1, with
    the sign minded). Then, of the answer's tokens alone, the presence penalty is subtracted once,
    and the frequency penalty as often as the token came.
    """
    logits = logits.astype(jnp.float32)
    repetition, presence, frequency = (
        of_all[:, None]
        for of_all in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    said = counts.generated > 0
    repeated = jnp.where(logits > 0, logits * (1 / repetition), logits * repetition)
    logits = jnp.where(counts.in_prompt | said, repeated, logits)
    logits = logits - presence * said.astype(jnp.float32)
    return logits - frequency * counts.generated.astype(jnp.float32)
