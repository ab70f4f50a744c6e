"""What a decode benchmark runs: a model of random weights, and keys and values as if of a prompt.

Times do not depend on what the weights are, but for one thing: how alike the queries of successive
steps are, which decides what wave attention finds in its row cache. So the embedding is made to say
it: token i + s is the more like token i the smaller s is, and a loop that feeds every s-th token
turns each query a little at every step. See `smooth_embedding` and `clustered_rows`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.checkpoints.levels import quantised
from models.config import ModelConfig
from models.formats import INT8, Formats, WeightFormat
from models.parameters import Params, nest, parameter_shapes
from models.quantised import QuantisedMatrix
from models.rope import inverse_frequencies

SHAPES = {
    "llama-3-8b": ModelConfig(
        architecture="llama",
        vocab_size=128_256,
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_context=2**20,
        rope_theta=500_000.0,
        norm_eps=1e-5,
    ),
    # In seconds on a CPU; the least head that the kernels know.
    "tiny": ModelConfig(
        architecture="llama",
        vocab_size=512,
        num_layers=2,
        hidden_size=128,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_context=2**20,
        rope_theta=500_000.0,
        norm_eps=1e-5,
    ),
}
SHAPES["smollm2"] = dataclasses.replace(
    SHAPES["llama-3-8b"],
    vocab_size=49_152,
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100_000.0,
    tie_embeddings=True,
)
SHAPES["qwen-0.5b"] = dataclasses.replace(
    SHAPES["smollm2"],
    vocab_size=151_936,
    num_layers=24,
    hidden_size=896,
    intermediate_size=4864,
    num_heads=14,
    num_kv_heads=2,
    rope_theta=1_000_000.0,
    qkv_bias=True,
)
WAVES = 16  # cosines that the embedding is the sum of
PERIODS = 10  # how often they go round, on average: a token is like its V / 60 next ones
STILL = 0.01  # radians a token: pairs of dimensions that RoPE turns more slowly carry the keys
MEMBERS = 64  # tokens that share a centre


def new_key(seed: int) -> Array:
    """Return a key of the generator that is fast on GPUs."""
    return jax.random.key(seed, impl="unsafe_rbg")


def random_params(
    model: ModelConfig, dtype: str, seed: int = 0, formats: Formats | None = None
) -> Params:
    """Random parameters: ones for norms, zeros for biases, else of variance 1 / inputs.

    The embedding is `smooth_embedding`. Matrices of `formats` have random levels, and one scale.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    formats = formats or {}
    for number, (path, shape) in enumerate(parameter_shapes(model).items()):
        key = jax.random.fold_in(new_key(seed), number)
        if path == ("embedding",):
            smooth = smooth_embedding(model, dtype, seed)
            leaves[path] = _in_format(smooth, formats.get(path))
        elif path in formats:
            leaves[path] = _random_levels(shape, dtype, formats[path], key)
        elif path[-1].endswith("norm"):
            leaves[path] = jnp.ones(shape, dtype)
        elif path[-1].endswith("bias"):
            leaves[path] = jnp.zeros(shape, dtype)
        else:
            leaves[path] = _random_stack(shape, dtype, key)
    return {"params": nest(leaves)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_stack(shape: tuple[int, ...], dtype: str, key: Array) -> Array:
    def matrix(key: Array) -> Array:
        return jax.random.normal(key, shape[-2:], dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)

    if len(shape) == 2:
        return matrix(key)
    # One layer at a time: the random bits of all would be the largest arrays of the run.
    return jax.lax.map(matrix, jax.random.split(key, shape[0]))


def _in_format(matrix: Array, format: WeightFormat | None) -> Any:
    return matrix if format is None else quantised(np.asarray(matrix), format)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_levels(
    shape: tuple[int, ...], dtype: str, format: WeightFormat, key: Array
) -> QuantisedMatrix:
    sizes = format.arrays(shape)
    size, kind = sizes["levels"]

    def matrix(key: Array) -> Array:
        return jax.random.bits(key, size[-2:], jnp.uint8).astype(kind)

    if len(shape) == 2:
        levels = matrix(key)
    else:
        levels = jax.lax.map(matrix, jax.random.split(key, shape[0]))
    # Levels are as likely as each other: their standard deviation is their number / sqrt(12).
    scale = shape[-1] ** -0.5 / (2**format.bits / 12**0.5)
    scales = jnp.full(sizes["scales"][0], scale, sizes["scales"][1])
    return QuantisedMatrix(levels, scales, columns=shape[-1], dtype=jnp.dtype(dtype))


def with_smooth_embedding(model: ModelConfig, params: Params, seed: int = 0) -> Params:
    """Return a checkpoint's parameters with a smooth embedding of the same size.

    It is in int8 if the old one is in 8 or 4 bits.
    """
    old = params["params"]["embedding"]
    in_levels = isinstance(old, QuantisedMatrix)
    floats = old.dequantise() if in_levels else old
    scale = jnp.std(floats.astype(jnp.float32))
    smooth = smooth_embedding(model, old.dtype.name, seed) * scale.astype(old.dtype)
    new = _in_format(smooth, INT8 if in_levels else None)
    return {"params": params["params"] | {"embedding": new}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def smooth_embedding(model: ModelConfig, dtype: str, seed: int) -> Array:
    """`[vocab, hidden]`: tokens of neighbouring numbers are alike, the last and the first too.

    A sum of cosines along the tokens, in random directions: the correlation of tokens i and i + s
    falls from 1 at s = 0 to about 0 at s = vocab / 16.
    """
    vocab = model.vocab_size
    which, how = jax.random.split(new_key(seed))
    periods = jnp.round(PERIODS * jax.random.normal(which, (WAVES,)))
    # The product of token and periods is whole: its rest by the vocabulary is the exact phase.
    turns = (jnp.arange(vocab)[:, None] * periods.astype(jnp.int32)) % vocab
    angles = 2 * jnp.pi * turns / vocab
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    directions = jax.random.normal(how, (2 * WAVES, model.hidden_size)) * WAVES**-0.5
    return (waves @ directions).astype(dtype)


def clustered_rows(model: ModelConfig, tokens: int, dtype: str, key: Array) -> tuple[Array, Array]:
    """Keys and values as of a prompt in one layer, `[tokens, kv_heads, head_dim]` each.

    Keys lie around a centre for each 64 tokens. They are large where RoPE hardly turns from one
    step to the next, as real models' keys are: so equal tokens ask for much the same rows.
    """
    heads, head_dim = model.num_kv_heads, model.head_dim
    to_centres, to_members, to_noise, to_values = jax.random.split(key, 4)
    count = max(1, tokens // MEMBERS)
    centres = jax.random.normal(to_centres, (count, heads, head_dim), dtype)
    own = jax.random.randint(to_members, (tokens,), 0, count)
    noise = jax.random.normal(to_noise, (tokens, heads, head_dim), dtype)
    weights = 1 / (1 + inverse_frequencies(model) / STILL)
    weights = np.tile(weights / np.sqrt(np.mean(weights**2)), 2)
    keys = (centres[own] + noise / 2) * jnp.asarray(weights, dtype)
    return keys, jax.random.normal(to_values, (tokens, heads, head_dim), dtype)


def memory_of(params: Any) -> int:
    """Bytes of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
