"""One sequence's step as two rows of the model: XLA makes fewer kernels of two rows than of one.

Of one row a norm is two kernels, a sum over an array and a product; of two rows it is one. And one
row by int8 weights is padded before each product, and cut after it. Products are as fast: they are
of 16 rows at least. The second row is the first one again, and attention sees the first alone.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from models.decoder import Attend
from models.parameters import Params
from models.quantised import formats_of

ROWS = 2


def takes_two(params: Params, batch: int, unrolls: bool) -> bool:
    """Whether a step is run so: of one sequence, where layers are written out, as on a GPU.

    Not by weights in groups, whose kernel takes each row apart.

    Args:
        params: the model's.
        batch: sequences of the step.
        unrolls: whether layers are written out.
    """
    if batch != 1 or not unrolls:
        return False
    formats = formats_of(params).items()
    return not any(path[0] == "layers" and format.group is not None for path, format in formats)


def repeated(array: Array) -> Array:
    """Repeat the one row of an array `[1, ...]`: `[ROWS, ...]`."""
    return jnp.broadcast_to(array, (ROWS, *array.shape[1:]))


def of_first(attend: Attend[Any]) -> Attend[Any]:
    """Make an attention of one sequence one of two rows: of the first, its output repeated."""

    def attend_first(
        layer: Array, query: Array, key: Array, value: Array, state: Any
    ) -> tuple[Array, Any]:
        output, state = attend(layer, query[:1], key[:1], value[:1], state)
        return repeated(output), state

    return attend_first
