"""Parameters whose layers are arrays of their own, not slices of stacks.

On a GPU, XLA copies a layer's matrix out of its stack before the product reads it: a decode step
then moves all weights three times. With layers of their own there is nothing to copy, but every
layer must be written out in the program: no loop can run over them. Matrices that multiply the same
numbers are joined too (`models.joined`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from models.joined import join_layer, separate_layer
from models.parameters import Params


def unstack_layers(params: Params) -> Params:
    """Give every layer arrays of its own; consume `params`.

    Each stack is deleted from the device as soon as its slices are made, so that the parameters
    and one more stack are the most that is held: `params` must not be used any more. All other
    arrays are in both trees. Query, key and value are joined then, gate and up too, layer by layer.

    Args:
        params: as `parameter_shapes` describes them: under ``layers`` a dict of stacks, ``[layers,
            ...]`` each.

    Returns:
        the same tree, but under ``layers`` a tuple with one dict for each layer, of arrays
        ``[...]``. `decoder.apply_model`, `decoder.apply_layer` and `Generator` take it; the Flax
        module `Decoder`, scans and checkpoints take stacks alone.
    """
    stacks = params["params"]["layers"]
    count = len(jax.tree.leaves(stacks)[0])
    layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(count))
    for name, stack in stacks.items():
        for number, layer in enumerate(layers):
            layer[name] = _take(stack, number)
        jax.block_until_ready([layer[name] for layer in layers])
        for array in jax.tree.leaves(stack):
            array.delete()
    return {"params": params["params"] | {"layers": tuple(join_layer(layer) for layer in layers)}}


def stack_layers(params: Params) -> Params:
    """Return the parameters with their layers stacked: copies, where they were not."""
    layers = params["params"]["layers"]
    if isinstance(layers, tuple):
        apart = [separate_layer(layer) for layer in layers]
        layers = jax.tree.map(lambda *each: jnp.stack(each), *apart)
    return {"params": params["params"] | {"layers": layers}}


def only_layer(params: Params, layer: int) -> Params:
    """Return what `decoder.apply_layer` reads of parameters, to run one layer by a traced number.

    Of unstacked layers, the one: it has the same shapes for every layer, and so the same compiled
    program. Of stacks, all.
    """
    layers = params["params"]["layers"]
    return {"params": {"layers": (layers[layer],) if isinstance(layers, tuple) else layers}}


def without_layers(params: Params) -> Params:
    """Return what is read before the first layer and after the last: hundreds of arrays fewer."""
    return {"params": {name: x for name, x in params["params"].items() if name != "layers"}}


@jax.jit
def _take(stack: Any, layer: Int[Array, ""] | int) -> Any:
    """Take a layer's part of a stack: of an array, or of all arrays of a quantised one."""
    # By a traced number: one program for all layers of a stack.
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)
