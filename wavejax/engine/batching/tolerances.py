"""Each request's tolerance, and what came of it; see `wavejax.store.tolerance`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine.checks import real_number
from wavejax.engine.state import DecodeState, was_donated
from wavejax.store.state import WaveState
from wavejax.store.tolerance import Met, Tolerances, begin, met_by, shares_of


def default_tolerance(attention: AnyAttention) -> float:
    """Return the tolerance of requests that give none; 0 where there is none to give."""
    return attention.config.tolerance if isinstance(attention, WaveAttention) else 0.0


def checked(tolerance: float | None, attention: AnyAttention) -> float | None:
    """Return a request's tolerance as a number of Python's own.

    Raises:
        InputError: it is no number from 0 to 1, or the attention has no tolerance.
    """
    if tolerance is None:
        return None
    if not default_tolerance(attention):
        raise InputError(
            "a request has a `tolerance`, and the engine has none: give its attention one, such "
            "as WaveConfig(tolerance=0.1), or leave it out"
        )
    number = real_number("`tolerance`", tolerance)
    if not 0 <= number <= 1:
        raise InputError(f"`tolerance` is {number}; it must be from 0, for none, to 1")
    return number


def begin_slot(
    state: DecodeState, slot: int, tolerance: float | None, attention: AnyAttention
) -> DecodeState:
    """Give a slot's next sequence its tolerance; the same state where there is none to give."""
    held = state.attention_state
    if not isinstance(held, WaveState) or held.tolerance is None:
        return state
    wanted = default_tolerance(attention) if tolerance is None else tolerance
    limit = jnp.float32(wanted or math.inf)
    held = dataclasses.replace(held, tolerance=begin(held.tolerance, np.int32(slot), limit))
    return dataclasses.replace(state, attention_state=held)


def copy_log(state: DecodeState | None) -> Tolerances | None:
    """Copy what has been counted so far, since a state's own is donated; does not wait."""
    held = None if state is None else state.attention_state
    log = held.tolerance if isinstance(held, WaveState) else None
    if log is None or was_donated(log):
        return None
    return jax.tree.map(jnp.copy, log)


def met_in(log: Tolerances | None, slot: int) -> Met | None:
    """Say how a slot's sequence met its tolerance; waits. None without one, or before a step."""
    if log is None or not math.isfinite(float(log.limits[slot])):
        return None
    shares = shares_of(log, slot)
    return None if shares is None else met_by(shares)
