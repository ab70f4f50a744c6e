"""`encode_tokens` as one Triton kernel, which reads keys and centroids once."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.toolbox import launch
from pallas_kernels.types import WORD_BITS, TokenCodes


@dataclasses.dataclass(frozen=True)
class Config:
    """Tokens a program encodes, and its warps."""

    tokens: int = 64
    num_warps: int = 4


def encode_tokens(
    keys: Array,
    centroids: Array,
    rotation_matrix: Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> TokenCodes:
    """See `pallas_kernels.encode_tokens`.

    The rotation is exact to about 2^-16 of the residual: a sign of something smaller may differ
    from the reference's.
    """
    *lead, head_dim = keys.shape
    launch.check_heads("encode_tokens", 1, head_dim, keys.dtype, centroids.dtype)
    tokens = math.prod(lead)
    if config is None:
        config = tuning.config(
            "encode_tokens",
            Config(tokens=128, num_warps=8) if head_dim > 128 else Config(),
            tokens=tokens,
            head_dim=head_dim,
            dtype=keys.dtype.name,
        )
    width, words = launch.tile(head_dim), -(-head_dim // WORD_BITS)
    padding = (0, words * WORD_BITS - head_dim), (0, width - head_dim)
    rotation = jnp.pad(rotation_matrix.astype(jnp.float32), padding)
    blocks = pl.cdiv(tokens, config.tokens)
    room = blocks * config.tokens
    codes, scales = launch.call(
        functools.partial(_kernel, shape=(config.tokens, words, width), head_dim=head_dim),
        (
            keys.reshape(tokens, head_dim),
            centroids.reshape(tokens, head_dim),
            *launch.split_bfloat16(rotation, 2),
        ),
        (
            jax.ShapeDtypeStruct((room, words), jnp.int32),
            jax.ShapeDtypeStruct((room,), jnp.float32),
        ),
        (blocks,),
        name="encode_tokens",
        num_warps=config.num_warps,
        interpret=interpret,
    )
    codes = lax.bitcast_convert_type(codes[:tokens], jnp.uint32)
    return TokenCodes(codes.reshape(*lead, words), scales[:tokens].reshape(lead))


def _kernel(
    keys_ref: Any,
    centroids_ref: Any,
    high_ref: Any,
    low_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    *,
    shape: tuple[int, int, int],
    head_dim: int,
) -> None:
    """Encode one block of tokens, 32 dimensions at a time."""
    block, words, width = shape
    token = pl.program_id(0) * block + jnp.arange(block)
    dims = jnp.arange(width)
    mask = (token < keys_ref.shape[0])[:, None] & (dims < head_dim)[None, :]

    def load(ref: Any) -> Any:
        at = ref.at[token[:, None], dims[None, :]]
        return plt.load(at, mask=mask, other=0.0).astype(jnp.float32)

    residual = load(keys_ref) - load(centroids_ref)
    high = residual.astype(jnp.bfloat16)
    low = (residual - high.astype(jnp.float32)).astype(jnp.bfloat16)

    def dot(a: Any, b: Any) -> Any:
        return jnp.dot(a, b.T, preferred_element_type=jnp.float32)

    l1, l2 = jnp.zeros((block,)), jnp.zeros((block,))
    bit = jnp.left_shift(1, jnp.arange(WORD_BITS, dtype=jnp.int32))
    for word in range(words):
        at = (pl.ds(word * WORD_BITS, WORD_BITS), pl.ds(0, width))
        rotation_high, rotation_low = plt.load(high_ref.at[at]), plt.load(low_ref.at[at])
        # What is left out is the product of the two low halves, 2^-16 of the whole.
        rotated = dot(low, rotation_high) + dot(high, rotation_low) + dot(high, rotation_high)
        l1 += jnp.sum(jnp.abs(rotated), axis=1)
        l2 += jnp.sum(rotated * rotated, axis=1)
        code = jnp.sum(jnp.where(rotated >= 0, bit[None, :], 0), axis=1)
        plt.store(codes_ref.at[token, word], code)
    scale = jnp.where(l1 == 0, 0.0, l2 / jnp.maximum(l1, 1e-30))
    plt.store(scales_ref.at[token], scale)
