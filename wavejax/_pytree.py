"""State classes: frozen dataclasses that are pytrees; the names of their arrays' axes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.sharding import PartitionSpec

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def state(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are all pytree children.

    Unlike `jax.tree_util.register_dataclass`, unflattening does not call `__init__`: JAX puts
    shapes, shardings and sentinels where arrays are declared, which the tests' shape checks on
    `__init__` would refuse.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    def flatten_with_keys(node: T) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names], None

    def flatten(node: T) -> tuple[list[Any], None]:
        return [getattr(node, name) for name in names], None

    def unflatten(_: None, children: Any) -> T:
        node = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(node, name, child)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def logical_axes(state: T) -> T:
    """Name the axes of every array of a state, for rules that map names to a mesh's axes.

    Each class of the state has `AXES`: for each field that is an array the names of its axes; for
    each field that is a state or a tuple of another package, the same again.

    Returns:
        the state's own tree, with a `PartitionSpec` of names in each array's place, as
        `flax.linen.logical_to_mesh` takes it. "layers", "sequences", "kv_heads", "clusters",
        "cluster_edges", "tokens", "slots", "sinks", "window", "directions", "vectors" and
        "head_dim" are of the model and the settings; "audits" is a log's length; "key_value" has
        two numbers, and "code_words" 32 dimensions in each.

    Raises:
        KeyError: a field has no names.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(tree, [PartitionSpec(*_names(state, path)) for path, _ in paths])


def _names(node: Any, path: tuple[Any, ...]) -> tuple[str, ...]:
    names: Any = getattr(type(node), "AXES", {})
    for key in path:
        name, node = key.name, getattr(node, key.name)
        names = names[name] if name in names else getattr(type(node), "AXES", None)
        if names is None:
            raise KeyError(f"the axes of {name} have no names")
    assert not isinstance(names, Mapping)
    return names
