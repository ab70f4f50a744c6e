"""Draws the next token from a model's logits."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from models.errors import InputError
from wavejax._pytree import state as pytree
from wavejax.engine.checks import real_number, whole_number
from wavejax.engine.penalties import Penalties


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; hashable. A state holds it as arrays, `SamplingSettings`.

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
        object.__setattr__(self, "top_k", whole_number("`top_k`", self.top_k, 0))
        for field in dataclasses.fields(self):
            if field.name != "top_k":
                number = real_number(f"`{field.name}`", getattr(self, field.name))
                object.__setattr__(self, field.name, number)
        # Logits divided by less, or more, would not stay apart in float32.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise InputError(
                f"`temperature` is {self.temperature}; it must be 0, or from 1e-6 to 1e6"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"`min_p` is {self.min_p}; it must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InputError(
                f"`repetition_penalty` is {self.repetition_penalty}; it must be from 0.01 to 100"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"`{name}` is {getattr(self, name)}; it must be from -2 to 2")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, and no randomness used."""
        return self.temperature == 0

    @property
    def ranks_tokens(self) -> bool:
        """Whether tokens are ranked before one is drawn: for `top_k` or `top_p`."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)

    def width(self, vocab: int) -> int:
        """How many tokens are ranked at most, where any are."""
        return min(self.top_k or vocab, vocab)

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
        return draw_tokens(settings_of([self] * logits.shape[0], logits.shape[1]), logits, keys)


@pytree
class SamplingSettings:
    """`Sampler`s of a batch as arrays, a row a sequence: `settings_of` makes them.

    Which fields there are is the structure of a compiled step; the numbers in them are not. So
    another temperature, top_p or penalty compiles nothing anew.

    Attributes:
        inverse_temperature: `[batch]` float32; 0 takes the most probable token. None: all do.
        log_min_p: `[batch]` float32, minus infinity for none; None with the temperature.
        ranks: `[width]` int32, 0, 1, 2, ...: as many of the most probable tokens as are ranked, a
            power of two or all. None where no sequence needs them ranked.
        top_k: `[batch]` int32, at most `width`; None with `ranks`.
        top_p: `[batch]` float32; None with `ranks`.
        ranked: `[batch]` bool, which sequences draw among ranked tokens; None where all do.
        penalties: None where no penalty is on.
    """

    inverse_temperature: Array | None = None
    log_min_p: Array | None = None
    ranks: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None
    ranked: Array | None = None
    penalties: Penalties | None = None


def settings_of(
    samplers: Sequence[Sampler], vocab: int, also: Sequence[Sampler] = ()
) -> SamplingSettings:
    """Samplers as arrays.

    Args:
        samplers: one for each sequence.
        vocab: how many tokens the model has.
        also: samplers that a sequence may get later; there are the fields that they need.
    """
    drawing = [one for one in (*samplers, *also) if not one.greedy]
    ranking = [one for one in drawing if one.ranks_tokens]
    names = ["inverse_temperature", "log_min_p"] if drawing else []
    ranks = None
    if ranking:
        names += ["top_k", "top_p"] + (["ranked"] if len(ranking) < len(drawing) else [])
        widest = max(one.width(vocab) for one in ranking)
        width = min(vocab, 2 ** (widest - 1).bit_length())
        ranks = jnp.asarray(np.arange(width, dtype=np.int32))
    if any(one.penalises for one in (*samplers, *also)):
        names.append("penalties")
    rows = _rows(samplers, ranks)
    return SamplingSettings(ranks=ranks, **{name: rows[name] for name in names})


def settings_row(sampler: Sampler, settings: SamplingSettings) -> SamplingSettings:
    """One sampler as a row, `[1]`, of settings that it fits: their fields, but for `ranks`."""
    rows = _rows([sampler], settings.ranks)
    return SamplingSettings(
        **{name: row for name, row in rows.items() if getattr(settings, name) is not None}
    )


def fits(sampler: Sampler, settings: SamplingSettings, vocab: int) -> bool:
    """Whether a sequence of a state with these settings can be drawn by a sampler."""
    if sampler.penalises and settings.penalties is None:
        return False
    if sampler.greedy:
        return True
    if settings.inverse_temperature is None:
        return False
    if sampler.ranks_tokens:
        return settings.ranks is not None and sampler.width(vocab) <= settings.ranks.shape[0]
    return settings.ranks is None or settings.ranked is not None


def _rows(samplers: Sequence[Sampler], ranks: Array | None) -> dict[str, Any]:
    """All fields of `SamplingSettings` but for its ranks."""

    def numbers(values: list[float]) -> Array:
        return jnp.asarray(np.asarray(values, np.float32))

    inverse = [0.0 if one.greedy else float(1 / np.float32(one.temperature)) for one in samplers]
    width = 1 if ranks is None else ranks.shape[0]
    most = [min(one.top_k or width, width) for one in samplers]
    kinds = ("repetition", "presence", "frequency")
    penalties = (numbers([getattr(one, f"{kind}_penalty") for one in samplers]) for kind in kinds)
    return {
        "inverse_temperature": numbers(inverse),
        "log_min_p": numbers([_log(one.min_p) for one in samplers]),
        "top_k": jnp.asarray(np.asarray(most, np.int32)),
        "top_p": numbers([one.top_p for one in samplers]),
        "ranked": jnp.asarray(np.asarray([one.ranks_tokens for one in samplers])),
        "penalties": Penalties(*penalties),
    }


def draw_tokens(
    settings: SamplingSettings, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """One int32 token for each row; see `Sampler.sample`."""
    # To `argmax` NaN is the largest number of all.
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    inverse = settings.inverse_temperature
    if inverse is None:
        return best
    # Division by a number known when a program is compiled is multiplication too.
    scaled = logits.astype(jnp.float32) * inverse[:, None]
    log_min_p, ranks, ranked = settings.log_min_p, settings.ranks, settings.ranked
    assert log_min_p is not None
    if ranks is None:
        drawn = jax.vmap(_draw)(scaled, keys, log_min_p)
    else:
        top_k, top_p = settings.top_k, settings.top_p
        assert top_k is not None
        assert top_p is not None
        draw_ranked = jax.vmap(functools.partial(_draw_ranked, ranks))
        drawn = draw_ranked(scaled, keys, log_min_p, top_k, top_p)
        if ranked is not None:
            drawn = jnp.where(ranked, drawn, jax.vmap(_draw)(scaled, keys, log_min_p))
    return jnp.where(inverse == 0, best, drawn)


def _draw(
    logits: Float[Array, " vocab"], key: Key[Array, ""], log_min_p: Float[Array, ""]
) -> Int[Array, ""]:
    # No ranking needed: spares sorting the vocabulary.
    kept = jnp.where(logits >= jnp.max(logits) + log_min_p, logits, -jnp.inf)
    return jax.random.categorical(key, kept).astype(jnp.int32)


def _draw_ranked(
    ranks: Int[Array, " width"],
    logits: Float[Array, " vocab"],
    key: Key[Array, ""],
    log_min_p: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    # Descending, ties by id.
    logits, tokens = jax.lax.top_k(logits, ranks.shape[0])
    logits = jnp.where(ranks < top_k, logits, -jnp.inf)
    keep = logits >= logits[0] + log_min_p
    share = jax.nn.softmax(logits)
    # A token counts while what stands before it holds less than top_p; so one always does.
    keep &= (jnp.cumsum(share) - share < top_p) | (top_p >= 1)
    # A rank's noise does not depend on how many are ranked.
    choice = jax.random.categorical(key, jnp.where(keep, logits, -jnp.inf))
    return tokens[choice].astype(jnp.int32)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def step_key(
    seed: int | Int[Array, ""], step: int | Int[Array, ""], sequence: int | Int[Array, ""] = 0
) -> Key[Array, ""]:
    """Return the key of one sequence's decode step.

    It is made of its seed, its number and the step, and no more.

    By Threefry, whatever JAX's default is: another generator's numbers may depend on the batch.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, sequence), step)


def step_keys(
    seed: int | Int[Array, "*seeds"],
    step: int | Int[Array, "*steps"],
    sequences: Int[Array, " batch"],
) -> Key[Array, " batch"]:
    """`[batch]`, the keys of these sequences' steps, each its own or one of all; see `step_key`."""
    seeds, steps = (jnp.broadcast_to(jnp.asarray(x), sequences.shape) for x in (seed, step))
    return jax.vmap(step_key)(seeds, steps, sequences)
