"""The decoder: RMSNorm, RoPE, grouped-query attention passed in, gated MLP; pure functions.

One set of functions serves Llama, Mistral, Qwen2, Qwen3 and SmolLM2. `apply_model` runs all layers,
and `Decoder` does as a Flax module; `embed`, `apply_layer`, `final_norm` and `unembed` are the same
steps one by one, for a caller that wants to do something between two layers (show progress, move a
layer's cache).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.parameters import Params, nest, parameter_shapes
from models.rope import cosines_and_sines, rotate

Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]
"""``attend(layer, query, key, value, state) -> (output, state)``

layer int32 scalar; query, output ``[batch, tokens, num_heads, head_dim]``; key, value ``[batch,
tokens, num_kv_heads, head_dim]``. Query and key come after their norm and RoPE. Query head h reads
kv head ``h // (num_heads // num_kv_heads)``. The 1/sqrt(head_dim) is the attention's to apply.
`state` is any pytree whose structure, shapes and dtypes stay as they are.
"""


MLP_BLOCK = 8192
"""Tokens of a prompt that go through an MLP at a time."""


class Decoder(nn.Module):
    """All layers of a decoder-only language model, as a Flax linen module.

    `init` makes random parameters; `apply` gives the hidden state after the final norm and the
    attention's state. Logits are `unembed`'s, so that a caller can ask for one position's alone.

    Attributes:
      config: the model's sizes and variations.
      attend: see `Attend`.
      unroll: False loops over the layers in compiled code; True writes every layer out, which runs
        faster on a GPU and compiles longer.
      param_dtype: dtype of the parameters that `init` makes.
    """

    config: ModelConfig
    attend: Attend
    unroll: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"], state: Any
    ) -> tuple[Float[Array, "batch tokens hidden"], Any]:
        """Runs tokens at their positions (both int32) through the model.

        Returns:
          hidden state after the final norm, in the parameters' dtype, and the attention's state.
        """
        tree = nest({path: path for path in parameter_shapes(self.config)})
        params = {"params": {name: self._parameter(name, below) for name, below in tree.items()}}
        return apply_model(
            self.config, params, tokens, positions, self.attend, state, unroll=self.unroll
        )

    def _parameter(self, name: str, below: Any) -> Any:
        """The parameter `name`, or the group of that name: `below` holds the full paths."""
        shapes = parameter_shapes(self.config)

        def init(key: Array) -> Any:
            paths = jax.tree.leaves(below, is_leaf=lambda node: isinstance(node, tuple))
            keys = jax.random.split(key, len(paths))
            leaves = {
                path: _random(path[-1], shapes[path], key, self.param_dtype)
                for path, key in zip(paths, keys, strict=True)
            }
            return nest(leaves)[name]

        return self.param(name, init)


def apply_model(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    attend: Attend,
    state: Any,
    unroll: bool = False,
) -> tuple[Float[Array, "batch tokens hidden"], Any]:
    """Runs tokens at their positions (both int32) through the embedding, all layers and the norm.

    Args:
      config: the model's.
      params: their layers stacked, or one by one as `unstacked.unstack_layers` makes them.
      tokens: their ids.
      positions: each token's place in its sequence.
      attend: see `Attend`.
      state: handed to `attend`.
      unroll: see `Decoder`. Layers that are not stacked are always written out.

    Returns:
      hidden state after the final norm, in the parameters' dtype, and the attention's state.

    Raises:
      ValueError: the parameters have another number of layers than `config`.
    """
    layers = params["params"]["layers"]
    count = len(layers) if isinstance(layers, tuple) else len(next(iter(layers.values())))
    if count != config.num_layers:
        raise ValueError(f"the parameters have {count} layers, the model {config.num_layers}")

    def run_layer(carry: tuple[Array, Any], layer: Array | int) -> tuple[Any, None]:
        hidden, state = carry
        return apply_layer(config, params, layer, hidden, positions, attend, state), None

    carry = (embed(config, params, tokens), state)
    if unroll or isinstance(layers, tuple):
        for layer in range(count):
            carry, _ = run_layer(carry, layer)
    else:
        carry, _ = jax.lax.scan(run_layer, carry, jnp.arange(count))
    hidden, state = carry
    return final_norm(config, params, hidden), state


def embed(
    config: ModelConfig, params: Params, tokens: Int[Array, "batch tokens"]
) -> Float[Array, "batch tokens {config.hidden_size}"]:
    """Looks up the tokens' embeddings, in the parameters' dtype."""
    return params["params"]["embedding"][tokens]


def apply_layer(
    config: ModelConfig,
    params: Params,
    layer: Int[Array, ""] | int,
    hidden: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    attend: Attend,
    state: Any,
) -> tuple[Float[Array, "batch tokens hidden"], Any]:
    """Runs one layer.

    Args:
      config: the model's.
      params: the whole model's; the layer is picked here. Only ``layers`` is read.
      layer: its number. As a traced scalar, one compiled program serves every layer; of layers
        that are not stacked only this one may then be given (`unstacked.only_layer`).
      hidden: input, in the parameters' dtype.
      positions: int32, each token's place in its sequence.
      attend: see `Attend`.
      state: handed to `attend`.

    Returns:
      the layer's output, in `hidden`'s dtype, and the attention's state.

    Raises:
      TypeError: the layer is a traced scalar, and several that are not stacked are given.
    """
    weights = pick_layer(params, layer)
    query, key, value = enter_layer(config, weights, hidden, positions)
    attended, state = attend(jnp.asarray(layer, jnp.int32), query, key, value, state)
    return leave_layer(config, weights, hidden, attended), state


def enter_layer(
    config: ModelConfig,
    weights: dict[str, Array],
    hidden: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
) -> tuple[
    Float[Array, "batch tokens heads head_dim"],
    Float[Array, "batch tokens kv_heads head_dim"],
    Float[Array, "batch tokens kv_heads head_dim"],
]:
    """What `apply_layer` does before attention, with the layer's own weights, of `pick_layer`."""
    normed = _rms_norm(hidden, weights["attention_norm"], config.norm_eps)
    query = _heads(normed, weights["query"], weights.get("query_bias"), config.head_dim)
    key = _heads(normed, weights["key"], weights.get("key_bias"), config.head_dim)
    value = _heads(normed, weights["value"], weights.get("value_bias"), config.head_dim)
    if config.qk_norm:
        query = _rms_norm(query, weights["query_norm"], config.norm_eps)
        key = _rms_norm(key, weights["key_norm"], config.norm_eps)
    cosines, sines = cosines_and_sines(config, positions)
    return rotate(query, cosines, sines), rotate(key, cosines, sines), value


def leave_layer(
    config: ModelConfig,
    weights: dict[str, Array],
    hidden: Float[Array, "batch tokens hidden"],
    attended: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens hidden"]:
    """What `apply_layer` does after attention: the layer's output, of its input `hidden`."""
    attended = attended.astype(hidden.dtype).reshape(*hidden.shape[:2], -1)
    hidden = hidden + _linear(attended, weights["output"])

    def mlp(hidden: Array) -> Array:
        normed = _rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
        gated = nn.silu(_linear(normed, weights["gate"])) * _linear(normed, weights["up"])
        return hidden + _linear(gated, weights["down"])

    return _by_blocks(mlp, hidden)


def final_norm(
    config: ModelConfig, params: Params, hidden: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    """Normalises the last layer's output, as `unembed` expects it."""
    return _rms_norm(hidden, params["params"]["final_norm"], config.norm_eps)


def unembed(
    config: ModelConfig, params: Params, hidden: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch {config.vocab_size}"]:
    """Logits, float32, of hidden states that `final_norm` has normalised."""
    table = params["params"]["embedding" if config.tie_embeddings else "unembedding"]
    return _linear(hidden, table, jnp.float32)


def mlp_block(tokens: int) -> int:
    """How many of a prompt's padded tokens the MLP treats at once: all of a short one's.

    Of a longer one's as large a part as goes evenly into them, up to `MLP_BLOCK`: a prompt's padded
    length (`wavejax.engine.prompts.bucket`) has large powers of two in it. Of other lengths all.
    """
    part = math.gcd(tokens, MLP_BLOCK)
    return tokens if tokens <= MLP_BLOCK or 8 * part < MLP_BLOCK else part


def _by_blocks(function: Callable[[Array], Array], hidden: Array) -> Array:
    """Applies what treats each token alone, to blocks of a long prompt's tokens one after another.

    The MLP's inner width is several times the model's: of a whole long prompt at once it would be
    the largest array of all.
    """
    batch, tokens, size = hidden.shape
    block = mlp_block(tokens)
    if block == tokens:
        return function(hidden)
    blocks = hidden.reshape(batch, tokens // block, block, size).swapaxes(0, 1)
    return jax.lax.map(function, blocks).swapaxes(0, 1).reshape(batch, tokens, size)


def pick_layer(params: Params, layer: Int[Array, ""] | int) -> dict[str, Array]:
    """One layer's weights by their names; arguments and TypeError as of `apply_layer`."""
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
        return {name: stack[layer] for name, stack in layers.items()}
    # Unlike stack[layer], this has no code for negative numbers, so it stays a plain slice.
    return {
        name: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        for name, stack in layers.items()
    }


def _linear(
    inputs: Float[Array, "*batch in"], matrix: Float[Array, "out in"], dtype: Any = None
) -> Float[Array, "*batch out"]:
    return jnp.einsum("...i,oi->...o", inputs, matrix, preferred_element_type=dtype)


def _heads(
    inputs: Float[Array, "batch tokens hidden"],
    matrix: Float[Array, "heads_times_dim hidden"],
    bias: Float[Array, "heads_times_dim"] | None,
    head_dim: int,
) -> Float[Array, "batch tokens heads {head_dim}"]:
    projected = _linear(inputs, matrix)
    if bias is not None:
        projected = projected + bias
    return projected.reshape(*inputs.shape[:2], -1, head_dim)


def _rms_norm(
    inputs: Float[Array, "*batch dim"], weight: Float[Array, "dim"], eps: float
) -> Float[Array, "*batch dim"]:
    """RMSNorm in float32, whatever the dtype of its input, which the output has."""
    wide = inputs.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(inputs.dtype)


def _random(name: str, shape: tuple[int, ...], key: Array, dtype: Any) -> Array:
    """Ones for norms, zeros for biases, else normal with variance 1 / inputs."""
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
