"""One layer in two halves, before and after its attention; and what layers are made of.

`decoder.apply_layer` puts the halves around an attention that it is given. A caller whose attention
is more than one call runs them itself: `pick_layer`, `enter_layer`, its attention, `leave_layer`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig
from models.joined import GATES, QUERIES, key_of
from models.parameters import Params
from models.quantised import QuantisedMatrix, multiply
from models.rope import cosines_and_sines, rotate

MLP_BLOCK = 8192
"""Tokens of a prompt that go through an MLP at a time."""


def pick_layer(params: Params, layer: Int[Array, ""] | int) -> dict[str, Any]:
    """Give one layer's weights by their names: arrays, quantised matrices, or joined ones.

    Args:
      params: the whole model's, or what `unstacked.only_layer` leaves of them.
      layer: its number, which may be a traced int32 scalar.

    Raises:
      TypeError: the layer is traced, and several that are not stacked are given.
    """
    layers = params["params"]["layers"]
    if isinstance(layers, tuple):
        if isinstance(layer, int):
            return layers[layer]
        if len(layers) != 1:
            raise TypeError(
                f"a traced number cannot pick one of {len(layers)} layers that are not stacked: "
                "give the params of the one that is run, see models.unstacked.only_layer"
            )
        return layers[0]
    if isinstance(layer, int):
        return jax.tree.map(lambda stack: stack[layer], layers)
    # Unlike stack[layer], this has no code for negative numbers, so it stays a plain slice.
    return jax.tree.map(
        lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), layers
    )


def enter_layer(
    config: ModelConfig,
    weights: dict[str, Any],
    layer: Int[Array, ""] | int,
    hidden: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
) -> tuple[
    Float[Array, "batch tokens heads head_dim"],
    Float[Array, "batch tokens kv_heads head_dim"],
    Float[Array, "batch tokens kv_heads head_dim"],
]:
    """Do what `decoder.apply_layer` does before attention.

    Args:
      config: the model's.
      weights: the layer's own, of `pick_layer`.
      layer: its number, which may be a traced int32 scalar: it says whether the layer has RoPE.
      hidden: the layer's input, in the parameters' dtype.
      positions: int32, each token's place in its sequence.

    Returns:
      query, key and value, in `hidden`'s dtype, as an `Attend` takes them.
    """
    normed = rms_norm(hidden, weights["attention_norm"], config.norm_eps)
    query, key, value = (
        _heads(product, weights.get(f"{name}_bias"), config.head_dim)
        for name, product in zip(QUERIES, products(normed, weights, QUERIES), strict=True)
    )
    if config.qk_norm:
        query = rms_norm(query, weights["query_norm"], config.norm_eps)
        key = rms_norm(key, weights["key_norm"], config.norm_eps)
    turns = _has_rope(config, layer)
    if turns is False:
        return query, key, value
    cosines, sines = cosines_and_sines(config, positions)
    if turns is not True:
        # By no angle, which leaves every number as it is, also where YaRN has a factor.
        cosines, sines = jnp.where(turns, cosines, 1.0), jnp.where(turns, sines, 0.0)
    return rotate(query, cosines, sines), rotate(key, cosines, sines), value


def leave_layer(
    config: ModelConfig,
    weights: dict[str, Any],
    hidden: Float[Array, "batch tokens hidden"],
    attended: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens hidden"]:
    """Do what `decoder.apply_layer` does after attention.

    Args:
      config: the model's.
      weights: the layer's own, of `pick_layer`.
      hidden: the layer's input, in the parameters' dtype.
      attended: what attention returned, in any floating dtype.

    Returns:
      the layer's output, in `hidden`'s dtype.
    """
    attended = attended.astype(hidden.dtype).reshape(*hidden.shape[:2], -1)
    hidden = hidden + linear(attended, weights["output"])

    def mlp(hidden: Array) -> Array:
        normed = rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
        gate, up = products(normed, weights, GATES)
        return hidden + linear(nn.silu(gate) * up, weights["down"])

    return _by_blocks(mlp, hidden)


def _has_rope(config: ModelConfig, layer: Int[Array, ""] | int) -> Bool[Array, ""] | bool:
    """Whether RoPE turns the layer's queries and keys: known now, or traced as its number is."""
    if config.rope_layers is None:
        return True
    if isinstance(layer, int):
        return config.rope_layers[layer]
    return jnp.asarray(config.rope_layers)[layer]


def mlp_block(tokens: int) -> int:
    """How many of a prompt's padded tokens the MLP treats at once: all of a short one's.

    Of a longer one's as large a part as goes evenly into them, up to `MLP_BLOCK`: a prompt's padded
    length (`wavejax.engine.prompts.bucket`) has large powers of two in it. Of other lengths all.
    """
    part = math.gcd(tokens, MLP_BLOCK)
    return tokens if tokens <= MLP_BLOCK or 8 * part < MLP_BLOCK else part


def _by_blocks(function: Callable[[Array], Array], hidden: Array) -> Array:
    """Apply what treats each token alone, to blocks of a long prompt's tokens one after another.

    The MLP's inner width is several times the model's: of a whole long prompt at once it would be
    the largest array of all.
    """
    batch, tokens, size = hidden.shape
    block = mlp_block(tokens)
    if block == tokens:
        return function(hidden)
    blocks = hidden.reshape(batch, tokens // block, block, size).swapaxes(0, 1)
    return jax.lax.map(function, blocks).swapaxes(0, 1).reshape(batch, tokens, size)


def linear(
    inputs: Float[Array, "*batch in"],
    matrix: Float[Array, "out in"] | QuantisedMatrix,
    dtype: Any = None,
) -> Float[Array, "*batch out"]:
    """Multiply by a matrix that is stored ``[out, in]``; `dtype` is the product's, if given.

    A quantised matrix gives what its dequantised numbers would, but for rounding (`multiply`).
    """
    if isinstance(matrix, QuantisedMatrix):
        return multiply(inputs, matrix, dtype)
    return jnp.einsum("...i,oi->...o", inputs, matrix, preferred_element_type=dtype)


def products(
    inputs: Float[Array, "*batch in"], weights: dict[str, Any], names: tuple[str, ...]
) -> list[Float[Array, "*batch out"]]:
    """Multiply by matrices of a layer, each for itself, or at once if they are joined."""
    joined = weights.get(key_of(names))
    if joined is None:
        return [linear(inputs, weights[name]) for name in names]
    return jnp.split(linear(inputs, joined.matrix), joined.starts, axis=-1)


def _heads(
    projected: Float[Array, "batch tokens heads_times_dim"],
    bias: Float[Array, "heads_times_dim"] | None,
    head_dim: int,
) -> Float[Array, "batch tokens heads {head_dim}"]:
    if bias is not None:
        projected = projected + bias
    return projected.reshape(*projected.shape[:2], -1, head_dim)


def rms_norm(
    inputs: Float[Array, "*batch dim"], weight: Float[Array, "dim"], eps: float
) -> Float[Array, "*batch dim"]:
    """RMSNorm in float32, whatever the dtype of its input, which the output has."""
    wide = inputs.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(inputs.dtype)
