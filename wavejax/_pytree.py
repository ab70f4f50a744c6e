"""State classes: frozen dataclasses that are pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def state(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose fields are all pytree children.

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
