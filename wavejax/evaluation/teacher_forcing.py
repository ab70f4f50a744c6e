"""Judges methods on full attention's own answer, token by token, and by answers of their own.

A method that is forced to say what full attention said can be compared at every token, whatever it
would have said before; its own greedy answer shows what comes of its mistakes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Key

from models.parameters import Params
from wavejax.engine.generator import NO_TOKEN, DecodeState, Generator

# Steps in one call: one compiled program serves answers of every length.
CHUNK = 128


class Answer(NamedTuple):
    """Full attention's answer, as far as one call goes.

    Attributes:
        tokens: `[CHUNK, batch]` int32; NO_TOKEN where a sequence had stopped.
        logits: `[CHUNK, batch, vocab]` float32, from which each token was drawn.
        steps: how many of the CHUNK were made.
    """

    tokens: Array
    logits: Array
    steps: int


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A method on an answer, token by token.

    Attributes:
        kl: `[steps, batch]` float32, KL(full || method) in nats.
        nll: `[steps, batch]` float32, -log of the method's probability of the answer's token.
        best: `[steps, batch]` int32, the method's most probable tokens.
    """

    kl: Float[np.ndarray, "steps batch"]
    nll: Float[np.ndarray, "steps batch"]
    best: Int[np.ndarray, "steps batch"]


def answer(
    generator: Generator,
    params: Params,
    state: DecodeState,
    steps: int,
    forced: np.ndarray | None = None,
    keys: Key[Array, " batch"] | None = None,
) -> list[Answer]:
    """Answers with full attention, keeping all logits.

    Args:
        generator: one with `DenseAttention`; its sampler has no effect.
        params: the model's.
        state: donated.
        steps: most tokens.
        forced: `[steps, batch]`, tokens that are said instead; None for the model's own.
        keys: `[batch]`, see `sample_keys`, by which tokens are drawn at temperature 1; None takes
            the most probable ones.

    Returns:
        the answer in calls of at most CHUNK steps; ends early once all sequences have stopped.
    """
    found = []
    for start in range(0, steps, CHUNK):
        count = min(CHUNK, steps - start)
        given = np.zeros((CHUNK, state.finished.shape[0]), np.int32)
        if forced is not None:
            given[:count] = forced[start : start + count]
        flag = jnp.bool_(forced is not None)
        state, tokens, logits, made = _answer(
            generator, params, state, jnp.asarray(given), flag, count, keys
        )
        found.append(Answer(tokens, logits, int(made)))
        if int(made) < count:
            break
    return found


def sample_keys(seed: int, first: int, count: int) -> Key[Array, " samples"]:
    """Return a key for each of so many samples, numbered from `first`: the same in any batch."""
    key = jax.random.key(seed % 2**32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(count))


def judge(
    generator: Generator, params: Params, state: DecodeState, answers: list[Answer]
) -> Judgement:
    """Force a method to say the answer; donate `state`."""
    parts = []
    for part in answers:
        state, *figures = _follow(
            generator, params, state, part.tokens, part.logits, jnp.bool_(True), part.steps
        )
        parts.append([np.asarray(figure)[: part.steps] for figure in figures])
    best, kl, nll = (np.concatenate(figure) for figure in zip(*parts, strict=True))
    return Judgement(kl, nll, best)


def greedy(
    generator: Generator, params: Params, state: DecodeState, answers: list[Answer], steps: int
) -> Int[np.ndarray, "steps batch"]:
    """Return a method's own greedy answer, NO_TOKEN after its end; donate `state`.

    Args:
        generator: the method's; its sampler has no effect.
        params: the model's.
        state: after the prompts.
        answers: full attention's, whose shapes alone matter: both then are one compiled program.
        steps: most tokens.
    """
    parts = []
    first = answers[0]
    for start in range(0, steps, CHUNK):
        count = min(CHUNK, steps - start)
        state, tokens, _, _ = _follow(
            generator, params, state, first.tokens, first.logits, jnp.bool_(False), count
        )
        parts.append(np.asarray(tokens)[:count])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _answer(
    generator: Generator,
    params: Params,
    state: DecodeState,
    given: Array,
    forced: Array,
    steps: Array,
    keys: Array | None,
) -> tuple[DecodeState, Array, Array, Array]:
    stop = jnp.asarray(generator.stop_tokens, jnp.int32)
    carry_type = tuple[DecodeState, Array, Array, Array]

    def one_step(carry: carry_type) -> carry_type:
        state, tokens, logits, i = carry
        drawn = jnp.argmax(state.logits, axis=-1).astype(jnp.int32)
        if keys is not None:
            own = jax.vmap(jax.random.fold_in)(keys, state.step)
            drawn = jax.vmap(jax.random.categorical)(own, state.logits).astype(jnp.int32)
        drawn = jnp.where(forced, given[i], drawn)
        tokens = tokens.at[i].set(jnp.where(state.finished, NO_TOKEN, drawn))
        logits = logits.at[i].set(state.logits)
        finished = state.finished | (~forced & jnp.isin(drawn, stop))
        state = dataclasses.replace(state, finished=finished)
        return generator.feed(params, state, drawn), tokens, logits, i + 1

    def more(carry: carry_type) -> Array:
        return (carry[3] < steps) & ~jnp.all(carry[0].finished)

    tokens = jnp.full_like(given, NO_TOKEN)
    logits = jnp.zeros((CHUNK, *state.logits.shape), jnp.float32)
    return lax.while_loop(more, one_step, (state, tokens, logits, jnp.int32(0)))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _follow(
    generator: Generator,
    params: Params,
    state: DecodeState,
    answer: Array,
    expected: Array,
    forced: Array,
    steps: Array,
) -> tuple[DecodeState, Array, Array, Array]:
    """Decode `steps` tokens: the answer's if forced, else the most probable ones.

    Returns the state and, `[CHUNK, batch]` each, the most probable tokens (NO_TOKEN after the end
    of an answer of its own), KL from the expected logits and -log p of the answer's tokens.
    """
    stop = jnp.asarray(generator.stop_tokens, jnp.int32)
    carry_type = tuple[DecodeState, Array, Array, Array, Array]

    def one_step(carry: carry_type) -> carry_type:
        state, best, kl, nll, i = carry
        own, full = jax.nn.log_softmax(state.logits), jax.nn.log_softmax(expected[i])
        top = jnp.argmax(own, axis=-1).astype(jnp.int32)
        # Once a sequence of the batch has ended, what it is forced to say does not count.
        given = jnp.maximum(answer[i], 0)
        best = best.at[i].set(jnp.where(state.finished, NO_TOKEN, top))
        kl = kl.at[i].set(jnp.sum(jnp.exp(full) * (full - own), axis=-1))
        nll = nll.at[i].set(-jnp.take_along_axis(own, given[:, None], axis=-1)[:, 0])
        said = jnp.where(forced, given, top)
        finished = state.finished | (~forced & jnp.isin(top, stop))
        state = dataclasses.replace(state, finished=finished)
        return generator.feed(params, state, said), best, kl, nll, i + 1

    def more(carry: carry_type) -> Array:
        return (carry[4] < steps) & ~jnp.all(carry[0].finished)

    zeros = jnp.zeros(answer.shape, jnp.float32)
    start = (state, jnp.full_like(answer, NO_TOKEN), zeros, zeros, jnp.int32(0))
    state, best, kl, nll, _ = lax.while_loop(more, one_step, start)
    return state, best, kl, nll


def places_of(reference: str, pieces: list[str]) -> np.ndarray | None:
    """Return the steps whose texts spell the reference in the answer; None if it is not there.

    As in the score, case does not matter.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    start = "".join(pieces).lower().find(reference.lower())
    if start < 0:
        return None
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + len(reference) - 1, side="right"))
    return np.arange(first, last + 1)


def bins(values: np.ndarray, size: int) -> Iterator[float]:
    """Means of each `size` values in turn, the last ones of fewer."""
    for start in range(0, len(values), size):
        yield float(values[start : start + size].mean())
