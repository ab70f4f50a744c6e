"""The decoder's parameter tree: names and shapes. One source for init, loading and storing."""

from typing import Any

from models.config import ModelConfig

Params = dict[str, Any]
"""``{"params": tree}`` as Flax gives it; `parameter_shapes` describes the tree."""

Path = tuple[str, ...]
Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[Path, Shape]:
    """Shape of every parameter by its path, in the order of use.

    Matrices are stored ``[out, in]``, as checkpoints do: nothing is transposed on loading, and a
    product with one token's vector reads each row in order. What lies under ``layers`` is stacked:
    its first axis is the layer.
    """
    layers, hidden, mlp = config.num_layers, config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    in_each_layer: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "query": (query_size, hidden),
        "key": (kv_size, hidden),
        "value": (kv_size, hidden),
        "output": (hidden, query_size),
        "mlp_norm": (hidden,),
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }
    if config.qkv_bias:
        in_each_layer |= {
            "query_bias": (query_size,),
            "key_bias": (kv_size,),
            "value_bias": (kv_size,),
        }
    if config.qk_norm:
        in_each_layer |= {"query_norm": (config.head_dim,), "key_norm": (config.head_dim,)}
    shapes: dict[Path, Shape] = {("embedding",): (config.vocab_size, hidden)}
    shapes |= {("layers", name): (layers, *shape) for name, shape in in_each_layer.items()}
    shapes[("final_norm",)] = (hidden,)
    if not config.tie_embeddings:
        shapes[("unembedding",)] = (config.vocab_size, hidden)
    return shapes


def nest(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Turns ``{("layers", "query"): x}`` into ``{"layers": {"query": x}}``."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree
