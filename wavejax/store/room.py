"""The tokens that each sequence of a state holds, and has room for."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from wavejax.config import WaveConfig
from wavejax.store.state import WaveState


def lengths(state: WaveState) -> Int[Array, " batch"]:
    """Count the tokens that each sequence holds: int32; the position of its next token."""
    steady = state.steady
    return steady.sink_tokens + state.index.tokens + steady.window_tokens


def remaining(config: WaveConfig, state: WaveState) -> Int[Array, " batch"]:
    """Count the tokens that each sequence has room for yet: int32."""
    growth = config.growth_tokens * _growths_left(config, state)
    return config.window_tokens - state.steady.window_tokens + growth


def window_tokens(config: WaveConfig, state: WaveState) -> Int[Array, " batch"]:
    """Count each window's rows in a step, its own included: for it a full one has no room."""
    return jnp.minimum(state.steady.window_tokens + 1, config.window_tokens)


def due(config: WaveConfig, state: WaveState) -> Bool[Array, " batch"]:
    """Say which sequences must grow before they take another token in, and can."""
    window_is_full = state.steady.window_tokens >= config.window_tokens
    return window_is_full & (_growths_left(config, state) > 0)


def _growths_left(config: WaveConfig, state: WaveState) -> Int[Array, " batch"]:
    grown = state.index.tokens - state.index.prompt_tokens
    return state.index.growths - grown // config.growth_tokens
