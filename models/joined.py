"""Matrices that have the same inputs, as one: their products are one product.

A step multiplies a few tokens by each matrix, and a small product's launch takes longer than its
bytes. Query, key and value as one matrix, gate and up as another, are two launches for five.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Matrix = Any
"""An array ``[out, in]``, or a `models.quantised.QuantisedMatrix` of that shape."""

# Names of a layer's matrices that multiply the same numbers.
QUERIES = ("query", "key", "value")
GATES = ("gate", "up")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedMatrices:
    """Matrices as one, a pytree.

    Attributes:
      matrix: ``[sum of rows, in]``, their rows one after another.
      names: of the matrices, in this order.
      rows: of each.
    """

    matrix: Matrix
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def starts(self) -> list[int]:
        """Where each matrix but the first begins."""
        return [sum(self.rows[: i + 1]) for i in range(len(self.rows) - 1)]

    def separate(self) -> dict[str, Matrix]:
        """Return the matrices by their names, as arrays of their own."""
        ends = [*self.starts, sum(self.rows)]
        return {
            name: jax.tree.map(lambda x, end=end, rows=rows: x[end - rows : end], self.matrix)
            for name, rows, end in zip(self.names, self.rows, ends, strict=True)
        }


def key_of(names: Sequence[str]) -> str:
    """Return the name of joined matrices in a layer's dict: no parameter's own."""
    return "+".join(names)


def join_layer(layer: dict[str, Any]) -> dict[str, Any]:
    """Join a layer's matrices that have the same inputs; consume those that are joined.

    Matrices in different formats stay as they are, and those that are split over devices.

    Args:
      layer: by their names, its arrays and quantised matrices.

    Returns:
      the dict with a `JoinedMatrices` by `key_of` in the place of each group's matrices. Their
      arrays are deleted from the device.
    """
    for names in (QUERIES, GATES):
        matrices = [layer[name] for name in names]
        if not _alike(matrices):
            continue
        joined = JoinedMatrices(
            matrix=jax.block_until_ready(_concatenate(matrices)),
            names=names,
            rows=tuple(matrix.shape[0] for matrix in matrices),
        )
        for array in jax.tree.leaves(matrices):
            array.delete()
        kept = {name: x for name, x in layer.items() if name not in names}
        layer = kept | {key_of(names): joined}
    return layer


def separate_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's parameters by their own names: what is joined as copies, the rest as is."""
    found: dict[str, Any] = {}
    for name, value in layer.items():
        found |= value.separate() if isinstance(value, JoinedMatrices) else {name: value}
    return found


@jax.jit
def _concatenate(matrices: list[Matrix]) -> Matrix:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *matrices)


def _alike(matrices: list[Matrix]) -> bool:
    """Whether the arrays can follow one another: of one format, on one device."""
    forms = {
        (jax.tree.structure(x), *((part.shape[1:], part.dtype) for part in jax.tree.leaves(x)))
        for x in matrices
    }
    devices = set().union(*(x.sharding.device_set for x in jax.tree.leaves(matrices)))
    return len(forms) == 1 and len(devices) == 1
