"""The decoder: RMSNorm, RoPE, grouped-query attention passed in, gated MLP; pure functions.

One set of functions serves every family of `models.families`. `apply_model` runs all layers, and
`Decoder` does as a Flax module. `embed`, `apply_layer`, `final_norm` and `unembed` are the same
steps one by one, for a caller that wants to do something between two layers (show progress, move a
layer's cache). The halves of `apply_layer` are in `models.layer`, and can be had here too.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.layer import (
    MLP_BLOCK,
    enter_layer,
    leave_layer,
    linear,
    mlp_block,
    pick_layer,
    rms_norm,
)
from models.parameters import Params, Path, Shape, nest, parameter_shapes
from models.quantised import QuantisedMatrix, look_up

__all__ = [
    "MLP_BLOCK",
    "Attend",
    "Decoder",
    "State",
    "apply_layer",
    "apply_model",
    "embed",
    "enter_layer",
    "final_norm",
    "leave_layer",
    "mlp_block",
    "pick_layer",
    "unembed",
]

State = TypeVar("State")
NewState = TypeVar("NewState")

Attend = Callable[[Array, Array, Array, Array, State], tuple[Array, State]]
"""``attend(layer, query, key, value, state) -> (output, state)``: the attention of every layer.

It is called once a layer, in the order of the layers, with what the tokens of this call make:

- layer: int32 scalar, from 0. It is traced where the layers run in a compiled loop, so that
  ``state[layer]`` works and ``if layer`` does not.
- query: ``[batch, tokens, num_heads, head_dim]``, after its norm and, in layers that have
  it, RoPE, in the parameters' dtype.
- key: ``[batch, tokens, num_kv_heads, head_dim]``, the same. Query head h reads kv head
  ``h // (num_heads // num_kv_heads)``.
- value: as key.
- state: what the layer before returned; for the first layer what the caller gave. Any pytree whose
  structure, shapes and dtypes stay as they are, such as the keys and values of earlier tokens.

It returns the output, with `query`'s shape and any floating dtype, and the new state. Which tokens
see which is the attention's to say, and the 1/sqrt(head_dim) its to apply.
"""


class Decoder(nn.Module):
    """All layers of a decoder-only language model, as a Flax linen module.

    `init` makes random parameters: ones for norms, zeros for biases, else normal numbers of
    variance 1 / inputs. `apply` gives the hidden state after the final norm, and the attention's
    state. Logits are `unembed`'s, so that a caller can ask for one position's alone.

    The variables are one collection, ``params``, which is what checkpoints are loaded as
    (`checkpoints.open.Checkpoint.load_params`): ``embedding``, ``layers`` (a dict of stacks, the
    layer first), ``final_norm`` and, unless the embedding is tied, ``unembedding``.
    Matrices may be quantised (`quantised.QuantisedMatrix`).
    `parameters.parameter_shapes` lists their shapes, `parameters.parameter_axes` names their axes
    ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab"), for a mesh's rules.

    A decoder with an attention of your own, which keeps no state:

    >>> import jax, jax.numpy as jnp
    >>> from models.config import ModelConfig
    >>> from models.decoder import Decoder, unembed
    >>> config = ModelConfig("llama", vocab_size=50, num_layers=2, hidden_size=32, head_dim=8,
    ...                      intermediate_size=48, num_heads=4, num_kv_heads=2, max_context=64)
    >>> def attend(layer, query, key, value, state):
    ...     return jax.nn.dot_product_attention(query, key, value, is_causal=True), state
    >>> decoder = Decoder(config, attend)
    >>> tokens, positions = jnp.array([[7, 3, 9]]), jnp.array([[0, 1, 2]])
    >>> variables = decoder.init(jax.random.key(0), tokens, positions, None)
    >>> hidden, state = decoder.apply(variables, tokens, positions, None)
    >>> unembed(config, variables, hidden).shape
    (1, 3, 50)

    Attributes:
      config: the model's sizes and variations.
      attend: the attention, called once a layer; see `Attend`.
      unroll: False loops over the layers in compiled code; True writes every layer out, which runs
        faster on a GPU and compiles longer.
      param_dtype: dtype of the parameters that `init` makes. Given parameters keep theirs, which
        hidden states take.
    """

    config: ModelConfig
    attend: Attend
    unroll: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        state: State,
    ) -> tuple[Float[Array, "batch tokens hidden"], State]:
        """Run tokens through the model.

        Args:
          tokens: int32, their ids. A prompt's tokens, or the last one of each sequence.
          positions: int32, each token's place in its sequence, from 0.
          state: handed to `attend`, and from one layer's to the next's.

        Returns:
          hidden state after the final norm, in the parameters' dtype, and the state that the last
          layer's attention returned.
        """
        tree = nest({path: path for path in parameter_shapes(self.config)})
        params = {"params": {name: self._parameter(name, below) for name, below in tree.items()}}
        return apply_model(
            self.config, params, tokens, positions, self.attend, state, unroll=self.unroll
        )

    def _parameter(self, name: str, below: Any) -> Any:
        """Return the parameter `name`, or the group of that name: `below` holds the full paths."""
        if self.has_variable("params", name):
            given = self.get_variable("params", name)
            nodes = jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, QuantisedMatrix))
            if any(isinstance(node, QuantisedMatrix) for node in nodes):
                # Flax would compare its arrays' shapes with the floats'.
                _check_shapes(parameter_shapes(self.config), name, below, given)
                return given
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
    attend: Attend[State],
    state: State,
    unroll: bool = False,
) -> tuple[Float[Array, "batch tokens hidden"], State]:
    """Run tokens at their positions (both int32) through the embedding, all layers and the norm.

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
    count = len(layers if isinstance(layers, tuple) else jax.tree.leaves(layers)[0])
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
    """Look up the tokens' embeddings, in the parameters' dtype."""
    table = params["params"]["embedding"]
    return look_up(table, tokens) if isinstance(table, QuantisedMatrix) else table[tokens]


def apply_layer(
    config: ModelConfig,
    params: Params,
    layer: Int[Array, ""] | int,
    hidden: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    attend: Callable[[Array, Array, Array, Array, State], tuple[Array, NewState]],
    state: State,
) -> tuple[Float[Array, "batch tokens hidden"], NewState]:
    """Run one layer.

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
    query, key, value = enter_layer(config, weights, layer, hidden, positions)
    attended, new = attend(jnp.asarray(layer, jnp.int32), query, key, value, state)
    return leave_layer(config, weights, hidden, attended), new


def final_norm(
    config: ModelConfig, params: Params, hidden: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    """Normalises the last layer's output, as `unembed` expects it."""
    return rms_norm(hidden, params["params"]["final_norm"], config.norm_eps)


def unembed(
    config: ModelConfig, params: Params, hidden: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch {config.vocab_size}"]:
    """Logits, float32, of hidden states that `final_norm` has normalised."""
    table = params["params"]["embedding" if config.tie_embeddings else "unembedding"]
    return linear(hidden, table, jnp.float32)


def _check_shapes(shapes: dict[Path, Shape], name: str, below: Any, given: Any) -> None:
    """Raise ValueError: a parameter is missing, or has another shape than the model's."""
    wanted = below if isinstance(below, dict) else {name: below}
    have = given if isinstance(below, dict) else {name: given}
    for key, path in wanted.items():
        found = have.get(key)
        if found is None or found.shape != shapes[path]:
            what = "missing" if found is None else f"of the shape {found.shape}"
            raise ValueError(f"parameter {'/'.join(path)} is {what}, and not {shapes[path]}")


def _random(name: str, shape: tuple[int, ...], key: Array, dtype: Any) -> Array:
    """Ones for norms, zeros for biases, else normal with variance 1 / inputs."""
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
