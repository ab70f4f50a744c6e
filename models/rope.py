"""Rotary position embedding, in the half-split layout of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, "half_head_dim"]:
    """Radians that each pair of dimensions turns per token, float32, after scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        scaled = frequencies
    elif scaling.kind == "linear":
        scaled = frequencies / scaling.factor
    elif scaling.kind == "divisors":
        scaled = frequencies / np.asarray(scaling.divisors)
    elif scaling.kind == "llama3":
        scaled = _llama3(frequencies, scaling)
    else:
        scaled = _yarn(frequencies, scaling, config.rope_theta, config.head_dim)
    return scaled.astype(np.float32)


def cosines_and_sines(
    config: ModelConfig, positions: Int[Array, "batch tokens"]
) -> tuple[Float[Array, "batch tokens half_head_dim"], Float[Array, "batch tokens half_head_dim"]]:
    """Cosine and sine of every position's angles, float32, times YaRN's attention factor."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    heads: Float[Array, "batch tokens heads head_dim"],
    cosines: Float[Array, "batch tokens half_head_dim"],
    sines: Float[Array, "batch tokens half_head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turn each head's dimensions (i, i + head_dim / 2) by their angle; keep the dtype."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


def _llama3(
    frequencies: Float[np.ndarray, "half_head_dim"], scaling: RopeScaling
) -> Float[np.ndarray, "half_head_dim"]:
    """Divides slow frequencies by the factor, keeps fast ones, blends between (Llama 3.1)."""
    rotations = scaling.original_context * frequencies / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((rotations - scaling.low_freq_factor) / width, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(
    frequencies: Float[np.ndarray, "half_head_dim"],
    scaling: RopeScaling,
    theta: float,
    head_dim: int,
) -> Float[np.ndarray, "half_head_dim"]:
    """Like `_llama3`, but blends linearly in the dimension's number (arXiv:2309.00071, 3.2)."""

    def dimension_that_turns(rotations: float) -> float:
        wavelength = scaling.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = dimension_that_turns(scaling.beta_fast)
    high = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A width of zero would divide by zero; any small one makes the same step.
    width = high - low if high != low else 1e-3
    slowed = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return frequencies * ((1 - slowed) + slowed / scaling.factor)
