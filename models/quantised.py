"""A matrix in 8 or 4 bits, and products with it. `models.formats` says which formats there are."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from models.formats import WeightFormat
from models.joined import JoinedMatrices
from models.parameters import Axes, Params, Path, Shape
from pallas_kernels.levels import Levels, dequantise
from pallas_kernels.multiply_levels import MOST_TOKENS, multiply_levels

LEAST_TOKENS = 2
"""One token XLA multiplies by int8 levels without its matrix product: on an H200 in 1.6 times the
time that two tokens take."""

_ARRAYS = ("levels", "scales", "scale_factors", "minima", "minimum_factors")


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix ``[..., out, in]`` in one of the formats of `models.formats`, as a pytree.

    The arrays may have axes before these, as stacks of layers do. What applies to the leading axes
    of all arrays, such as indexing, slicing and `jax.lax.scan`, gives a `QuantisedMatrix` again.

    Attributes:
      levels, scales, scale_factors, minima, minimum_factors: arrays ``[..., out, ...]``, as in
        `pallas_kernels.levels.Levels`.
      columns: the size of `in`.
      dtype: of the floats that the matrix stands for: the model's.
    """

    levels: Array
    scales: Array
    scale_factors: Array | None = None
    minima: Array | None = None
    minimum_factors: Array | None = None
    columns: int = dataclasses.field(kw_only=True)
    dtype: Any = dataclasses.field(kw_only=True)

    @property
    def parts(self) -> Levels:
        """The arrays alone."""
        return Levels(*(getattr(self, name) for name in _ARRAYS))

    @property
    def shape(self) -> Shape:
        """Of the matrix that this stands for."""
        return (*self.levels.shape[:-1], self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def format(self) -> WeightFormat:
        """How the numbers are kept."""
        bits = 8 if self.levels.dtype == jnp.int8 else 4
        width = self.levels.shape[-1] * 8 // bits
        groups, factors = self.scales.shape[-1], self.scale_factors
        of_channels = bits == 8 and groups == 1 and factors is None and width == self.columns
        return WeightFormat(
            bits=bits,
            group=None if of_channels else width // groups,
            scale=self.scales.dtype.name,
            block=None if factors is None else width // factors.shape[-1],
            minima=self.minima is not None,
        )

    def dequantise(self, dtype: Any = None) -> Float[Array, "*lead out in"]:
        """Return the numbers: computed in float32, then rounded to `dtype`, or to the own one."""
        numbers = dequantise(self.parts)[..., : self.columns]
        return numbers.astype(dtype or self.dtype)


def _flatten_with_keys(matrix: QuantisedMatrix) -> tuple[list[tuple[Any, Any]], tuple[int, Any]]:
    keys = [(jax.tree_util.GetAttrKey(name), getattr(matrix, name)) for name in _ARRAYS]
    return keys, (matrix.columns, matrix.dtype)


def _unflatten(static: tuple[int, Any], children: Any) -> QuantisedMatrix:
    # Without __init__: JAX puts other things than arrays where arrays are declared.
    matrix = object.__new__(QuantisedMatrix)
    names = (*_ARRAYS, "columns", "dtype")
    for name, value in zip(names, (*children, *static), strict=True):
        object.__setattr__(matrix, name, value)
    return matrix


jax.tree_util.register_pytree_with_keys(QuantisedMatrix, _flatten_with_keys, _unflatten)


def multiply(
    inputs: Float[Array, "*batch in"], matrix: QuantisedMatrix, dtype: Any = None
) -> Float[Array, "*batch out"]:
    """Multiply by a matrix ``[out, in]``, which is dequantised within the product only.

    With a scale a channel, products of levels are summed in float32 and then scaled: levels are
    exact in every float dtype. With groups, the numbers are rounded to the inputs' dtype first, as
    a float matrix is. In both cases the result is that of the dequantised matrix, but for rounding.
    With groups, up to `MOST_TOKENS` tokens are the op `multiply_levels`, which has a kernel.

    Args:
      inputs: of a floating dtype.
      matrix: without axes before `out`.
      dtype: the product's; None: the inputs'.
    """
    # By the barrier the numbers depend on the inputs. Else XLA would take their conversion out of
    # a loop over steps, and keep all the model's floats.
    matrix, inputs = lax.optimization_barrier((matrix, inputs))
    if matrix.format.group is None and matrix.minima is None:
        levels = matrix.levels.astype(inputs.dtype)
        if 0 < math.prod(inputs.shape[:-1]) < LEAST_TOKENS:
            ways = {"cuda": _multiply_padded, "default": _multiply_floats}
            summed = lax.platform_dependent(inputs, levels, **ways)
        else:
            summed = _multiply_floats(inputs, levels)
        scales = matrix.scales[..., 0].astype(jnp.float32)
        return (summed * scales).astype(dtype or inputs.dtype)

    if 0 < math.prod(inputs.shape[:-1]) <= MOST_TOKENS:
        return multiply_levels(inputs, matrix.parts, dtype=dtype)
    numbers = matrix.dequantise(inputs.dtype)
    return jnp.einsum("...i,oi->...o", inputs, numbers, preferred_element_type=dtype)


def _multiply_floats(inputs: Array, matrix: Array) -> Array:
    return jnp.einsum("...i,oi->...o", inputs, matrix, preferred_element_type=jnp.float32)


def _multiply_padded(inputs: Array, matrix: Array) -> Array:
    """Multiply as if there were `LEAST_TOKENS` tokens."""
    tokens = math.prod(inputs.shape[:-1])
    rows = jnp.pad(inputs.reshape(tokens, -1), ((0, LEAST_TOKENS - tokens), (0, 0)))
    # Behind a barrier, or XLA would see that only a part of the product is asked for.
    product = lax.optimization_barrier(_multiply_floats(lax.optimization_barrier(rows), matrix))
    return product[:tokens].reshape(*inputs.shape[:-1], -1)


def look_up(matrix: QuantisedMatrix, rows: Int[Array, "*batch"]) -> Float[Array, "*batch in"]:
    """Return rows of a matrix ``[out, in]`` by their numbers, in its dtype; no other is read."""
    return jax.tree.map(lambda x: x[rows], matrix).dequantise()


def matrix_axes(matrix: QuantisedMatrix, names: Axes) -> QuantisedMatrix:
    """Name the axes of the arrays, for a mesh's rules.

    Args:
      matrix: the matrix, or a stack of them.
      names: of the float matrix, `parameters.parameter_axes`.

    Returns:
      the matrix's own tree, with a `PartitionSpec` in each array's place. What has one entry for a
      whole row has no name in place of the last one. Else a part of an axis must hold whole groups,
      and whole blocks.
    """

    def of(array: Array) -> jax.sharding.PartitionSpec:
        last = None if array.shape[-1] == 1 else names[-1]
        return jax.sharding.PartitionSpec(*names[:-1], last)

    return jax.tree.map(of, matrix)


def formats_of(params: Params) -> dict[Path, WeightFormat]:
    """Return the formats of those parameters that are quantised, stacked or not, by their paths."""
    tree = params["params"]
    layers = tree["layers"][0] if isinstance(tree["layers"], tuple) else tree["layers"]
    leaves: dict[Path, Any] = {(name,): x for name, x in tree.items() if name != "layers"}
    for name, x in layers.items():
        if isinstance(x, JoinedMatrices):
            leaves |= {("layers", each): x.matrix for each in x.names}
        else:
            leaves["layers", name] = x
    return {path: x.format for path, x in leaves.items() if isinstance(x, QuantisedMatrix)}
