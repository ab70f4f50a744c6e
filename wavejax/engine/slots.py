"""Slots: a sequence's place in a batch. A prompt takes one, and leaves it for another prompt."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from models.errors import InputError
from models.parameters import Params
from wavejax.attention.state_shapes import state_shapes
from wavejax.engine import penalties
from wavejax.engine.interface import Engine
from wavejax.engine.prefill import read_prompt
from wavejax.engine.prompts import answer_room, bucket, least_of_bucket
from wavejax.engine.sampling import Sampler, fits, settings_of, settings_row
from wavejax.engine.state import DecodeState, commit
from wavejax.store.shape import CacheShape

# Of a state, what has a row for each slot, but for the attention's and the logits.
_ROWS = ("finished", "seed", "step", "sequences", "nonfinite", "counts", "sampling")


def allocate(
    engine: Engine,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    samplers: list[Sampler],
    shortest_prompt: int = 1,
) -> DecodeState:
    """Return an empty state; see `Generator.allocate`."""
    room, vocab = bucket(prompt_tokens), engine.model_config.vocab_size
    shape, sizes = CacheShape.of(engine.model_config), (batch, room, answer_room(new_tokens))
    # Prompts of one bucket share compiled programs.
    shortest = least_of_bucket(shortest_prompt)
    if shortest > 1:  # Without an index, or of one size of clusters, shorter ones have room too.
        given = engine.attention, shape, *sizes, jnp.dtype(dtype)
        for_all, for_these = (jax.tree.leaves(state_shapes(*given, x)) for x in (1, shortest))
        shortest = 1 if for_all == for_these else shortest
    empty = engine.attention.init_state(shape, *sizes, dtype, shortest_prompt=shortest)
    empty, logits = commit((empty, jnp.zeros((batch, vocab), jnp.float32)))
    # Memory that is refused shows now, not when all has been read and compiled for nothing.
    jax.block_until_ready(empty)
    settings = settings_of([Sampler()] * batch, vocab, samplers)
    values = {
        "finished": jnp.ones(batch, bool),
        "seed": jnp.zeros(batch, jnp.int32),
        "step": jnp.zeros(batch, jnp.int32),
        "sequences": jnp.arange(batch, dtype=jnp.int32),
        "nonfinite": jnp.zeros(batch, bool),
        "counts": None if settings.penalties is None else penalties.no_counts(batch, vocab),
        "sampling": settings,
        "prompt_room": jnp.int32(room),
        "shortest_prompt": jnp.int32(shortest),
    }
    return DecodeState(engine.hold(empty), logits, **commit(values))


def insert(
    engine: Engine,
    params: Params,
    state: DecodeState,
    slot: int,
    prompt: Int[np.ndarray, "_tokens"],
    *,
    seed: int,
    sequence: int,
    step: int,
    sampler: Sampler,
    progress: Callable[[int], None] | None = None,
) -> DecodeState:
    """Read a prompt into a slot, whatever is there; see `Generator.insert`."""
    given = params, prompt, slot, state.attention_state, state.logits
    attention_state, logits = read_prompt(engine, *given, progress)
    return enter(
        state,
        attention_state,
        logits,
        slot,
        prompt,
        seed=seed,
        sequence=sequence,
        step=step,
        sampler=sampler,
    )


def enter(
    state: DecodeState,
    attention_state: Any,
    logits: Array,
    slot: int,
    prompt: Int[np.ndarray, "_tokens"],
    *,
    seed: int,
    sequence: int,
    step: int,
    sampler: Sampler,
) -> DecodeState:
    """Begin a slot's sequence, whose prompt `attention_state` and `logits` hold; donates `state`.

    Arguments as of `Generator.insert`.
    """
    vocab = logits.shape[1]
    counts = None if state.counts is None else penalties.count_prompts([prompt], vocab)
    settings = state.sampling
    row = {
        "finished": np.zeros(1, bool),
        "seed": np.asarray([seed], np.int32),
        "step": np.asarray([step], np.int32),
        "sequences": np.asarray([sequence], np.int32),
        "nonfinite": np.zeros(1, bool),
        "counts": counts,
        "sampling": settings_row(sampler, settings),
    }
    rows: dict[str, Any] = {name: getattr(state, name) for name in _ROWS}
    # Which ranks there are is no row of any slot.
    rows["sampling"] = dataclasses.replace(settings, ranks=None)
    rows = _set_row(rows, np.int32(slot), row)
    rows["sampling"] = dataclasses.replace(rows["sampling"], ranks=settings.ranks)
    new = {"attention_state": attention_state, "logits": logits} | rows
    return dataclasses.replace(state, **new)


def check_insert(
    state: DecodeState,
    slot: int,
    prompt_tokens: int,
    sampler: Sampler,
    indexed_as: int | None = None,
) -> None:
    """Whether a prompt can be read into a slot; waits for the device.

    Args:
        state: before.
        slot: which.
        prompt_tokens: the prompt's.
        sampler: its own.
        indexed_as: its clusters are as large as those of a prompt of so many; None: of its own.

    Raises:
        InputError: the slot is in use; the state has no room for so long a prompt, or for the many
            clusters of so short a one; or the sampler needs what the state was not allocated for.
    """
    if state.prompt_room is None:
        raise InputError("the state has no slots: make it with `Generator.allocate`, or `start`")
    if not bool(np.asarray(state.finished)[slot]):
        raise InputError(f"slot {slot} is in use: `release` it first")
    room = int(state.prompt_room)
    if bucket(prompt_tokens) > room:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, and there is room for {room}: give `allocate` "
            "a larger prompt_tokens"
        )
    shortest = 1 if state.shortest_prompt is None else int(state.shortest_prompt)
    least = prompt_tokens if indexed_as is None else indexed_as
    if least < shortest:
        raise InputError(
            f"the prompt has {least} tokens, and the state was made for prompts of "
            f"{shortest} and more: give `allocate` a smaller shortest_prompt"
        )
    if not fits(sampler, state.sampling, state.logits.shape[1]):
        raise InputError(
            "the sampler needs what the state was not made for (noise, ranks or penalties): give "
            "`allocate` samplers like it"
        )


def release(state: DecodeState, slot: int) -> DecodeState:
    """End a slot's sequence; see `Generator.release`."""
    ended = _set_row(state.finished, np.int32(slot), np.ones(1, bool))
    return dataclasses.replace(state, finished=ended)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(rows: Any, slot: Array, row: Any) -> Any:
    return jax.tree.map(lambda all_rows, one: all_rows.at[slot].set(one[0]), rows, row)
