"""The two routes of a kernel through Triton: JAX's backend of Pallas, and ours, `own_triton`.

JAX says that its backend will go. Ours needs XLA's Triton alone, or the package `triton`.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels import own_triton
from pallas_kernels.own_triton.call import STOCK, VARIABLE

_triton: Any
try:
    from jax.experimental.pallas import triton as _triton
except ImportError:
    _triton = None

# The same by both routes: they are Pallas' own.
load = own_triton.load
store = own_triton.store

# How an interpreted kernel is called. A test may put another interpreter here.
interpreted_call: Callable[..., Any] = functools.partial(pl.pallas_call, interpret=True)


def takes_own_route() -> bool:
    """Say whether kernels for GPUs take `own_triton`, not JAX's Triton backend.

    `WAVEJAX_TRITON` chooses: "jax"; "own", by XLA's Triton; or "stock", by the package `triton`.
    Without it, it is JAX's where JAX has one, else our own. It is read when a kernel is traced: set
    it before the process starts, or call `jax.clear_caches()`.

    Raises:
        ValueError: the variable is something else.
        ModuleNotFoundError: JAX has no Triton backend, and the variable asks for it.
    """
    asked = os.environ.get(VARIABLE) or None
    if asked not in (None, "jax", "own", STOCK):
        raise ValueError(f"{VARIABLE}: no route {asked!r}; give jax, own or {STOCK}")
    if asked == "jax" and _triton is None:
        raise ModuleNotFoundError(
            f"{VARIABLE} is jax, but JAX {jax.__version__} has no Triton backend of Pallas: "
            "leave the variable out"
        )
    return asked in ("own", STOCK) or _triton is None


def check_route() -> None:
    """Raise what `takes_own_route` raises; also where `WAVEJAX_TRITON` asks for `triton` in vain.

    Raises:
        ValueError, ModuleNotFoundError: see there, and where the package `triton` is missing.
    """
    if not takes_own_route() or os.environ.get(VARIABLE) != STOCK:
        return
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(
            f"{VARIABLE} is {STOCK}, and that way wants the package triton: pip install triton, or "
            "leave the variable out"
        )


def pallas_call(
    kernel: Callable[..., None],
    *,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    **settings: Any,
) -> Callable[..., Any]:
    """Return what `pl.pallas_call` does, for GPUs.

    Args:
        kernel: of refs.
        num_warps, num_stages: see Triton.
        interpret: run it as plain JAX, on any platform.
        settings: others of `pl.pallas_call`.

    Raises:
        ModuleNotFoundError, ValueError: see `takes_own_route`.
    """
    if interpret:
        return interpreted_call(kernel, **settings)
    if takes_own_route():
        return own_triton.pallas_call(
            kernel, num_warps=num_warps, num_stages=num_stages, **settings
        )
    parameters = _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=parameters, **settings)


def atomic_add(ref: Any, at: tuple[Any, ...], value: Any) -> jax.Array:
    """Add to one int32 of a ref, as one of many programs that do; returns what was there before."""
    return _route().atomic_add(ref, at, value)


def debug_barrier() -> None:
    """Make a program's stores visible to all of its threads' later loads."""
    _route().debug_barrier()


def inline_assembly(
    text: str, operands: Sequence[Any], constraints: str, dtype: Any, pack: int = 1
) -> jax.Array:
    """Compute what a piece of CUDA's assembly makes of tensors, element by element.

    Args:
        text: PTX; $0 is the result, $1 and so on are the operands.
        operands: of one shape.
        constraints: of the registers of result and operands, as LLVM writes them.
        dtype: the result's.
        pack: elements that the text treats at once.
    """
    if takes_own_route():
        return own_triton.inline_assembly(text, operands, constraints, dtype, pack)
    [result] = _triton.elementwise_inline_asm(
        text,
        args=operands,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, dtype)],
    )
    return result


def _route() -> Any:
    return own_triton if takes_own_route() else _triton
