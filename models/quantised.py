"""A matrix in 8 or 4 bits, and products with it. `models.formats` says which formats there are."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from models.formats import WeightFormat
from models.parameters import Axes, Params, Path, Shape

FEW_ROWS = 4
"""Up to this number of tokens, a GPU multiplies by a matrix in groups without a matrix product."""

ROWS_AT_ONCE = 2
"""So many tokens' sums are made together: the matrix is read once for each."""

_ARRAYS = ("levels", "scales", "scale_factors", "minima", "minimum_factors")


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix ``[..., out, in]`` in one of the formats of `models.formats`, as a pytree.

    The arrays may have axes before these, as stacks of layers do. What applies to the leading axes
    of all arrays, such as indexing, slicing and `jax.lax.scan`, gives a `QuantisedMatrix` again.

    Attributes:
      levels: int8 ``[..., out, width]``; or, in 4 bits, uint8 ``[..., out, width / 2]``. `width` is
        `in`, padded to whole groups. The byte i of a group of n holds its levels i, in the lower
        half, and i + n / 2; without minima 8 is added to them.
      scales: ``[..., out, groups]``, float32, float16, bfloat16, or int8 with factors.
      scale_factors: float16 ``[..., out, blocks]``, which scales are multiplied by; or None.
      minima: as `scales`, or None.
      minimum_factors: as `scale_factors`, or None.
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
        numbers = self._whole_numbers().astype(jnp.float32)
        numbers = numbers * _wide(self.scales, self.scale_factors)[..., None]
        if self.minima is not None:
            numbers = numbers + _wide(self.minima, self.minimum_factors)[..., None]
        numbers = numbers.reshape(*numbers.shape[:-2], -1)[..., : self.columns]
        return numbers.astype(dtype or self.dtype)

    def _whole_numbers(self) -> Int[Array, "*lead out groups group"]:
        grouped = self.levels.reshape(*self.scales.shape, -1)
        if self.levels.dtype == jnp.int8:
            return grouped
        shifts = jnp.array([[0], [4]], jnp.uint8)
        halves = (grouped[..., None, :] >> shifts & 15).astype(jnp.int8)
        levels = halves.reshape(*self.scales.shape, -1)
        return levels - 8 if self.minima is None else levels


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
        summed = jnp.einsum("...i,oi->...o", inputs, levels, preferred_element_type=jnp.float32)
        scales = matrix.scales[..., 0].astype(jnp.float32)
        return (summed * scales).astype(dtype or inputs.dtype)

    def product(inputs: Array, matrix: QuantisedMatrix) -> Array:
        numbers = matrix.dequantise(inputs.dtype)
        return jnp.einsum("...i,oi->...o", inputs, numbers, preferred_element_type=dtype)

    def sums(inputs: Array, matrix: QuantisedMatrix) -> Array:
        few = inputs.reshape(-1, inputs.shape[-1])

        def of(rows: Array, matrix: QuantisedMatrix) -> Array:
            numbers = matrix.dequantise(inputs.dtype).astype(jnp.float32)
            return jnp.sum(rows[:, None, :].astype(jnp.float32) * numbers, axis=-1)

        # Of more rows at once XLA would write the floats to memory after all; and so it would if
        # two sums could share them, which a barrier between them forbids.
        parts: list[Array] = []
        for i in range(0, len(few), ROWS_AT_ONCE):
            matrix, parts = lax.optimization_barrier((matrix, parts))
            parts.append(of(few[i : i + ROWS_AT_ONCE], matrix))
        summed = jnp.concatenate(parts).reshape(*inputs.shape[:-1], -1)
        return summed.astype(dtype or inputs.dtype)

    if not 0 < math.prod(inputs.shape[:-1]) <= FEW_ROWS:
        return product(inputs, matrix)
    # XLA's products on GPUs take a conversion as an operand, but no scales of groups: the floats
    # would be written to memory and read again. Sums take any operand as it is computed.
    return lax.platform_dependent(inputs, matrix, cuda=sums, rocm=sums, default=product)


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
    leaves |= {("layers", name): x for name, x in layers.items()}
    return {path: x.format for path, x in leaves.items() if isinstance(x, QuantisedMatrix)}


def _wide(small: Array, factors: Array | None) -> Float[Array, "*lead out groups"]:
    """Return scales or minima in float32, times their factors if they have any."""
    wide = small.astype(jnp.float32)
    if factors is None:
        return wide
    blocks = wide.reshape(*factors.shape, -1) * factors.astype(jnp.float32)[..., None]
    return blocks.reshape(wide.shape)
