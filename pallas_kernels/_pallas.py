"""What the Triton kernels share: how Pallas is called, what a tile may be, and barriers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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
        operands: arrays, on the device or in pinned host memory that the GPU reads in place; or
            None, of which the kernel gets None.
        out_shape: pytree of `jax.ShapeDtypeStruct`.
        grid: programs; the first axis runs fastest.
        name: of the kernel, for profiles.
        num_warps, num_stages: see Triton.
        aliases: operands that are written in place, and which result each of them is.
        interpret: run it as plain JAX, on any platform. For tests.
    """
    if interpret:
        # Interpreted, a kernel is plain JAX, which does not mix memories.
        operands = jax.device_put(operands, jax.memory.Space.Device)
    operands = tuple(operands)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=jax.tree.map(lambda _: pl.no_block_spec, out_shape),
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


def scalar(x: Any) -> jax.Array:
    """A number as an operand: Triton's kernels take arrays."""
    return jnp.asarray(x, jnp.int32)


def precision(dtype: Any) -> Any:
    """What `dot` is asked for: float32 operands are not to be rounded to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def on_cuda() -> bool:
    """Whether kernels are made for NVIDIA's GPUs, whose PTX some of them hold."""
    return jax.default_backend() != "gpu" or jax.devices()[0].device_kind.startswith("NVIDIA")


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
