"""The semantics of `encode_tokens`, in plain JAX."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.types import WORD_BITS, TokenCodes


@functools.cache
def rotation(head_dim: int) -> np.ndarray:
    """Make the fixed random rotation R of all codes: `[head_dim, head_dim]` float32, orthogonal.

    Uniform over the orthogonal group: the QR decomposition of a Gaussian matrix, its signs fixed
    (Mezzadri, arXiv math-ph/0609050).
    """
    gaussian = np.random.default_rng(20260502922).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def rotate(query: Array) -> Array:
    """R q in float32, for a few vectors `[..., head_dim]`.

    As products and a sum: XLA makes one kernel of it, converts in it, and rounds nothing to TF32.
    """
    matrix = jnp.asarray(rotation(query.shape[-1]))
    return jnp.sum(query.astype(jnp.float32)[..., None, :] * matrix, axis=-1)


def pack_signs(x: Array) -> Array:
    """Packs `x >= 0` along the last axis into uint32 words; bits past its end are zero."""
    head_dim = x.shape[-1]
    words = -(-head_dim // WORD_BITS)
    bits = jnp.pad(x >= 0, [(0, 0)] * (x.ndim - 1) + [(0, words * WORD_BITS - head_dim)])
    bits = bits.reshape(*x.shape[:-1], words, WORD_BITS).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(WORD_BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack_signs(codes: Array, head_dim: int) -> Array:
    """Invert `pack_signs`: +1 or -1, int8 `[..., head_dim]`."""
    bits = (codes[..., None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    bits = bits.reshape(*codes.shape[:-1], -1)[..., :head_dim]
    return (2 * bits.astype(jnp.int8) - 1).astype(jnp.int8)


def encode_tokens(keys: Array, centroids: Array, rotation_matrix: Array) -> TokenCodes:
    """See `pallas_kernels.encode_tokens`."""
    if keys.ndim > 3:
        # As in `build_clusters`. A product of other sizes may also round otherwise.
        return lax.map(lambda x: encode_tokens(x[0], x[1], rotation_matrix), (keys, centroids))
    residual = keys.astype(jnp.float32) - centroids.astype(jnp.float32)
    rotated = jnp.einsum("...d,ed->...e", residual, rotation_matrix)
    l1 = jnp.sum(jnp.abs(rotated), axis=-1)
    scales = jnp.where(l1 == 0, 0.0, jnp.sum(rotated**2, axis=-1) / jnp.maximum(l1, 1e-30))
    return TokenCodes(pack_signs(rotated), scales)
