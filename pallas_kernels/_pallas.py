"""What the Triton kernels share: how Pallas is called, what a tile may be, and barriers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# The least rows and columns that Triton's `dot` takes.
DOT_TILE = 16

HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP = 16
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def call(
    kernel: Callable[..., None],
    operands: Sequence[Any],
    out_shape: Any,
    grid: tuple[int, ...],
    *,
    name: str,
    num_warps: int,
    num_stages: int = 2,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """Runs a kernel whose operands and results are whole arrays: it finds its own part of them.

    Args:
        kernel: takes a ref for each operand, then one for each result.
        operands: arrays; on the device, or in pinned host memory that the GPU reads in place.
        out_shape: pytree of `jax.ShapeDtypeStruct`.
        grid: programs; the first axis runs fastest.
        name: of the kernel, for profiles.
        num_warps, num_stages: see Triton.
        aliases: operands that are written in place, and which result each of them is.
        interpret: run it as plain JAX, on any platform. For tests.
    """
    if interpret:
        # Interpreted, a kernel is plain JAX, which does not mix memories.
        operands = [jax.device_put(x, jax.memory.Space.Device) for x in operands]
    # Constants must not be weakly typed or Python numbers: a ref has a dtype of its own.
    operands = [jnp.asarray(x) for x in operands]
    specs = jax.tree.map(lambda _: pl.no_block_spec, out_shape)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=specs,
        input_output_aliases=dict(aliases or {}),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*operands)


def barrier(interpret: bool) -> None:
    """Makes a program's stores visible to all of its threads' later loads."""
    if not interpret:
        plt.debug_barrier()


def tile(size: int, least: int = 1) -> int:
    """The tile that holds so many: a power of two."""
    return max(pl.next_power_of_2(size), least)


def check_heads(op: str, group: int, head_dim: int, *dtypes: Any) -> None:
    """Raises NotImplementedError for heads that the kernels are not made for."""
    if head_dim not in HEAD_DIMS:
        known = ", ".join(str(d) for d in HEAD_DIMS)
        raise NotImplementedError(f"{op}: head_dim is {head_dim}; the kernel knows {known}")
    if not 1 <= group <= MAX_GROUP:
        raise NotImplementedError(
            f"{op}: {group} query heads share a kv head; the kernel knows 1 to {MAX_GROUP}"
        )
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise NotImplementedError(
                f"{op}: dtype is {jnp.dtype(dtype).name}; the kernel knows bfloat16, float16 and "
                "float32"
            )
