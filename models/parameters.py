"""The decoder's parameter tree: names, axes, shapes. One source for init, loading and storing."""

from typing import Any

from models.config import ModelConfig

Params = dict[str, Any]
"""``{"params": tree}`` as Flax gives it; `parameter_shapes` describes the tree.

A matrix, or a stack of matrices, may be a `quantised.QuantisedMatrix` in place of an array. Layers
that `unstacked.unstack_layers` took apart may have `joined.JoinedMatrices` in place of several.
"""

Path = tuple[str, ...]
Axes = tuple[str, ...]
Shape = tuple[int, ...]


def parameter_axes(config: ModelConfig) -> dict[Path, Axes]:
    """Name the axes of every parameter by its path, in the order of use.

    The names, by which a mesh's rules say what is split over which devices:

    - ``layers``: what lies under ``layers`` is stacked, the layer first.
    - ``vocab``: tokens of the vocabulary.
    - ``embed``: the model's width, `hidden_size`.
    - ``heads``, ``kv_heads``: query heads and key/value heads times `head_dim`, head after head. A
      part of such an axis holds whole heads if the parts are as many as divide the heads.
    - ``head_dim``: the dimensions of one head, the same for all heads.
    - ``mlp``: the MLP's inner width, `intermediate_size`.

    Matrices are stored ``[out, in]``, as checkpoints do: nothing is transposed on loading, and a
    product with one token's vector reads each row in order.
    """
    in_each_layer: dict[str, Axes] = {
        "attention_norm": ("embed",),
        "query": ("heads", "embed"),
        "key": ("kv_heads", "embed"),
        "value": ("kv_heads", "embed"),
        "output": ("embed", "heads"),
        "mlp_norm": ("embed",),
        "gate": ("mlp", "embed"),
        "up": ("mlp", "embed"),
        "down": ("embed", "mlp"),
    }
    if config.qkv_bias:
        in_each_layer |= {
            "query_bias": ("heads",),
            "key_bias": ("kv_heads",),
            "value_bias": ("kv_heads",),
        }
    if config.qk_norm:
        in_each_layer |= {"query_norm": ("head_dim",), "key_norm": ("head_dim",)}
    axes: dict[Path, Axes] = {("embedding",): ("vocab", "embed")}
    axes |= {("layers", name): ("layers", *names) for name, names in in_each_layer.items()}
    axes[("final_norm",)] = ("embed",)
    if not config.tie_embeddings:
        axes[("unembedding",)] = ("vocab", "embed")
    return axes


def parameter_shapes(config: ModelConfig) -> dict[Path, Shape]:
    """Give the shape of every parameter by its path, in the order of `parameter_axes`."""
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    return {
        path: tuple(sizes[axis] for axis in axes) for path, axes in parameter_axes(config).items()
    }


def nest(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Turn ``{("layers", "query"): x}`` into ``{"layers": {"query": x}}``."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree
