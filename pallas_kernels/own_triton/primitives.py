"""What kernels ask of a GPU that neither `jax.lax` nor Pallas has: additions, barriers, assembly.

They are for `own_triton`'s lowering alone: interpreted kernels do without.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.own_triton._jax_internals import ReadEffect, WriteEffect, core, local_effect

# Operands: a ref, an int32 index for each of its axes, and the number.
atomic_add_p = core.Primitive("own_atomic_add")
# Without operands or results.
barrier_p = core.Primitive("own_barrier")
barrier_p.multiple_results = True
# Operands: tensors of one shape. Parameters: `text`, `constraints`, `dtype`, `pack`.
assembly_p = core.Primitive("own_inline_assembly")

_barrier_effect = local_effect("OwnBarrierEffect")


def atomic_add(ref: Any, at: tuple[Any, ...], value: Any) -> jax.Array:
    """Add to one number of a ref, as one of many programs that do; returns what was there before.

    Args:
        ref: int32.
        at: an index for each axis.
        value: int32, a scalar.
    """
    indices = [jnp.asarray(index, jnp.int32) for index in at]
    return atomic_add_p.bind(ref, *indices, jnp.asarray(value, jnp.int32))


def debug_barrier() -> None:
    """Make a program's stores visible to all of its threads' later loads."""
    barrier_p.bind()


def inline_assembly(
    text: str, operands: Sequence[Any], constraints: str, dtype: Any, pack: int = 1
) -> jax.Array:
    """Compute what a piece of CUDA's assembly makes of tensors, element by element.

    Args:
        text: PTX; $0 is the result, $1 and so on are the operands.
        operands: tensors of one shape.
        constraints: of the registers of result and operands, as LLVM writes them.
        dtype: the result's.
        pack: elements that the text treats at once.
    """
    return assembly_p.bind(
        *operands, text=text, constraints=constraints, dtype=jnp.dtype(dtype), pack=pack
    )


@atomic_add_p.def_effectful_abstract_eval
def _added(ref: Any, *operands: Any) -> Any:
    *indices, value = operands
    if ref.dtype != jnp.int32 or value.dtype != jnp.int32 or value.shape:
        raise TypeError(
            f"atomic_add adds one int32 to int32, not {value.dtype}{list(value.shape)} to "
            f"{ref.dtype}"
        )
    if len(indices) != len(ref.shape) or any(index.shape for index in indices):
        raise TypeError(f"atomic_add wants a scalar index for each axis of {list(ref.shape)}")
    return jax.core.ShapedArray((), jnp.dtype("int32")), {ReadEffect(0), WriteEffect(0)}


@barrier_p.def_effectful_abstract_eval
def _waited() -> Any:
    return (), {_barrier_effect}


@assembly_p.def_abstract_eval
def _computed(*operands: Any, text: str, constraints: str, dtype: Any, pack: int) -> Any:
    del text, constraints, pack
    if len({operand.shape for operand in operands}) != 1:
        raise TypeError(f"assembly wants operands of one shape, not {operands}")
    return jax.core.ShapedArray(operands[0].shape, dtype)
