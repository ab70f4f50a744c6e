"""What the Triton kernels share: how Pallas is called, what a tile may be, and barriers."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend

# The least rows and columns that most kernels give Triton's `dot`; it takes eight columns, too.
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
    """Run a kernel whose operands and results are whole arrays: it finds its own part of them.

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

    Raises:
        NotImplementedError: an operand or a result is larger than the kernel reaches.
    """
    if interpret:
        # Interpreted, a kernel is plain JAX, which does not mix memories.
        operands = jax.device_put(operands, jax.memory.Space.Device)
    else:
        check_addressable(name, (operands, out_shape))
    operands = tuple(operands)

    def run(*operands: Any) -> Any:
        return backend.pallas_call(
            # A kernel of its own each time: JAX would keep what it was traced to for all platforms.
            functools.partial(kernel),
            out_shape=out_shape,
            grid=grid,
            in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
            out_specs=jax.tree.map(lambda _: pl.no_block_spec, out_shape),
            input_output_aliases=dict(aliases or {}),
            num_warps=num_warps,
            num_stages=num_stages,
            interpret=interpret,
            name=name,
        )(*operands)

    return run(*operands) if interpret else backend.per_platform(run)(*operands)


def barrier(interpret: bool) -> None:
    """Make a program's stores visible to all of its threads' later loads."""
    if not interpret:
        backend.debug_barrier()


def add_atomically(ref: Any, at: tuple[Any, ...], value: Any, interpret: bool) -> Any:
    """Add to one integer in place, as one of many programs that do; returns what was there before.

    One, not a vector of them: with jax 0.11.2 on an H100 a vector's atomic additions went astray.

    Args:
        ref: int32.
        at: indices.
        value: int32.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        before = backend.load(ref.at[at])
        backend.store(ref.at[at], before + value)
        return before
    return backend.atomic_add(ref, at, value)


assembly = backend.inline_assembly


def tile(size: int, least: int = 1) -> int:
    """Return the tile that holds so many: a power of two."""
    return max(pl.next_power_of_2(size), least)


def scalar(x: Any) -> jax.Array:
    """Make a number as an operand: Triton's kernels take arrays."""
    return jnp.asarray(x, jnp.int32)


def dot(a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
    """Matrix product in float32; float32 operands are not rounded to TF32.

    Args:
        a, b: matrices of one dtype, each side a power of two and at least `DOT_TILE`; but b may
            have eight columns.
        contract: the axis of each that is summed over.
    """
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def head_of(program: Any, kv_heads: int, group: int) -> tuple[Any, Any, Any]:
    """Sequence, kv head and place in the group of a grid that runs over all query heads."""
    return program // (kv_heads * group), program // group % kv_heads, program % group


def split_bfloat16(x: Any, parts: int) -> list[Any]:
    """Find the bfloat16 numbers whose sum is x to 8 bits a part: three hold all of a float32."""
    found: list[Any] = []
    while len(found) < parts:
        # Not a cast to bfloat16 and back, which XLA may simplify away.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        if len(found) < parts:
            x = x - part
    return found


def compute_capability() -> tuple[int, int] | None:
    """Return that of JAX's default device, if it is one of NVIDIA's GPUs; else None."""
    # Asked of an NVIDIA GPU only: of others JAX gives other strings.
    if not backend.on_nvidia():
        return None
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return int(major), int(minor)


def takes_assembly(interpret: bool) -> bool:
    """Say whether a kernel may hold CUDA's assembly: not interpreted, nor for others' GPUs."""
    return not interpret and backend.takes_assembly()


def check_heads(op: str, group: int, head_dim: int, *dtypes: Any) -> None:
    """Raise NotImplementedError for heads that the kernels are not made for."""
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


def check_vectors(op: str, name: str, vectors: Any) -> None:
    """Raise NotImplementedError for vectors, floats or int8 levels, that kernels do not read."""
    dtype = jnp.dtype(vectors.dtype)
    if dtype not in (*FLOATS, jnp.int8):
        raise NotImplementedError(
            f"{op}: {name} is {dtype.name}; the kernel knows bfloat16, float16, float32 and int8"
        )


def check_addressable(kernel: str, arrays: Any) -> None:
    """Raise NotImplementedError for arrays that Pallas' pointers do not reach the end of.

    Places in an array of up to 2^32 bytes are counted in 32 bits, with a sign: where each number
    is one byte, the second half of them is out of reach. Past that they are counted in 64 bits.

    Args:
        kernel: its name.
        arrays: pytree of its operands and results.
    """
    for array in jax.tree.leaves(arrays):
        size = math.prod(array.shape)
        if jnp.dtype(array.dtype).itemsize == 1 and 2**31 < size <= 2**32:
            raise NotImplementedError(
                f"{kernel}: an array has {size} numbers of one byte; the kernel reaches up to "
                "2^31 of them, or more than 2^32"
            )
