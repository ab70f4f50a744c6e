"""The one door to Pallas' backends: what kernels take from them, and for what they are lowered.

Of Triton's, for GPUs, by one of two routes (`triton_route`), and of Mosaic's, for TPUs. A kernel
for GPUs is traced before it is known for which platform it will be lowered. What only NVIDIA's GPUs
take, CUDA's assembly, is asked for by `takes_assembly`. A call that asks is one of `per_platform`:
it is traced anew where it is lowered for another platform than it was traced for.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as _tpu
from jax.extend import core
from jax.interpreters import batching, mlir

from pallas_kernels import triton_route
from pallas_kernels.modes import standard_modes

pallas_call = triton_route.pallas_call
load = triton_route.load
store = triton_route.store
atomic_add = triton_route.atomic_add
debug_barrier = triton_route.debug_barrier

# A TPU's memories, and copies between them that run beside the program.
vector_memory = _tpu.VMEM
scalar_memory = _tpu.SMEM
copy_semaphores = _tpu.SemaphoreType.DMA
async_copy = _tpu.make_async_copy

# JAX's names of the platforms that the kernels are lowered for.
CUDA, ROCM, TPU = "cuda", "rocm", "tpu"

# Which of them is traced for, where that is known. It is part of the keys of JAX's caches.
_traced_for = jax.make_user_context(default_value=None)


def tpu_call(
    kernel: Callable[..., None],
    *,
    scalars: int,
    scratch: tuple[Any, ...],
    interpret: bool,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    **settings: Any,
) -> Callable[..., Any]:
    """Return what `pl.pallas_call` does, for TPUs.

    The grid's last axis is one program's work in turn: what it keeps in its scratch memory lasts
    from one step to the next. The other axes are rows of their own.

    Args:
        kernel: of the scalars' refs, the operands', the results' and the scratch memory's.
        scalars: how many operands are in scalar memory before the kernel starts, for its
            `in_specs` too. They come first, and have no spec.
        scratch: see `pltpu.PrefetchScalarGridSpec`.
        interpret: run it as plain JAX on any platform, as a TPU would: with its memories and
            copies, NaN in memory that nobody wrote, and a detector of races. For tests.
        grid, in_specs, out_specs, settings: see `pl.pallas_call`.
    """
    rows: Any = ("parallel",) * (len(grid) - 1)
    return pl.pallas_call(
        kernel,
        grid_spec=_tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=_tpu.CompilerParams(dimension_semantics=(*rows, "arbitrary")),
        interpret=_tpu.InterpretParams(detect_races=True) if interpret else False,
        **settings,
    )


def inline_assembly(text: str, *operands: Any, dtype: Any, pack: int = 1) -> Any:
    """Compute what a piece of CUDA's assembly makes of tensors, element by element.

    Args:
        text: PTX; $0 is the result, $1 and so on are the operands. With `pack` each takes as many
            registers as its elements fill, numbered on.
        operands: of one shape, of 32 or 64 bits; with `pack` also of fewer.
        dtype: the result's, of that shape too. (Pallas' assembly has one result.)
        pack: elements that the text treats at once, in the order of their registers.

    Raises:
        RuntimeError: it is traced for GPUs of another maker. Ask `takes_assembly` first.
    """
    if not takes_assembly():
        raise RuntimeError(
            f"CUDA's assembly in a kernel that is lowered for {_platform()}; the kernel wants to "
            "ask backend.takes_assembly, and to do without"
        )

    def registers(dtype: Any, prefix: str = "") -> list[str]:
        dtype = jnp.dtype(dtype)
        size = dtype.itemsize
        if pack > 1 and size < 4:
            return [prefix + "r"] * (pack * size // 4)
        return [prefix + ("f" if dtype == jnp.float32 else {4: "r", 8: "l"}[size])] * pack

    constraints = registers(dtype, "=") + [r for x in operands for r in registers(x.dtype)]
    return triton_route.inline_assembly(text, operands, ",".join(constraints), dtype, pack)


def on_nvidia() -> bool:
    """Say whether JAX's default device is one of NVIDIA's GPUs."""
    return jax.default_backend() == "gpu" and jax.devices()[0].device_kind.startswith("NVIDIA")


def takes_assembly() -> bool:
    """Say whether what is traced may hold CUDA's assembly.

    Before it is lowered that is a guess: no, if JAX's default device is a GPU of another maker.
    Inside of `per_platform` a wrong guess is put right. What asks outside must be right everywhere,
    whatever the answer.
    """
    return _platform() == CUDA


def is_for_tpu() -> bool:
    """Say whether what is traced is for TPUs: said by `traced_for_tpu`, or JAX's default device."""
    return _platform() == TPU


def traced_for_tpu() -> contextlib.AbstractContextManager[None]:
    """Trace for TPUs what is traced inside, whatever JAX's default device: to compile for them."""
    return _traced_for(TPU)


def is_for_default_device() -> bool:
    """Say whether what is traced is for JAX's default device, or may be."""
    return _platform() == _guess()


def per_platform(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make of a function one that is traced for the platform that it is lowered for.

    `lax.platform_dependent` would trace all of its branches and leave a conditional around the one
    that is taken. This one is traced once where the first guess is right, as on every GPU, and
    leaves nothing behind.

    Args:
        function: of pytrees of arrays, which closes over no traced array. Its results' shapes and
            dtypes are the same whatever `takes_assembly` says. Arguments by keyword are settings,
            not arrays. Without derivatives.
    """

    @functools.wraps(function)
    def call(*operands: Any, **settings: Any) -> Any:
        flat, tree = jax.tree.flatten(operands)

        def of_flat(*flat: Any) -> list[Any]:
            return jax.tree.leaves(function(*jax.tree.unflatten(tree, flat), **settings))

        platform = _platform()
        traced = functools.partial(function, **settings)
        with _traced_for(platform):
            jaxpr, shapes = jax.make_jaxpr(traced, return_shape=True)(*operands)
        found = _per_platform.bind(*flat, jaxpr=jaxpr, traced_for=platform, function=of_flat)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return call


def _platform() -> str:
    """Return the platform that is lowered for, where that is known; else the likely one."""
    known: str | None = _traced_for.value
    return _guess() if known is None else known


def _guess() -> str:
    if jax.default_backend() == "tpu":
        return TPU
    return ROCM if jax.default_backend() == "gpu" and not on_nvidia() else CUDA


# Parameters: what a function was traced to, for which platform, and the function, which is traced
# again for another one.
_per_platform = core.Primitive("per_platform")
_per_platform.multiple_results = True


@_per_platform.def_impl
def _run(*operands: Any, **parameters: Any) -> Any:
    with jax.disable_jit(False):  # or else it would come here again
        return jax.jit(functools.partial(_per_platform.bind, **parameters))(*operands)


@_per_platform.def_abstract_eval
def _avals(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals


def _lower(
    context: Any,
    *operands: Any,
    jaxpr: Any,
    traced_for: str,
    function: Any,
    platform: str | None = None,
) -> Any:
    # What kernels are lowered to is made of traced functions too.
    with standard_modes():
        if platform in (None, traced_for):
            made = core.jaxpr_as_fun(jaxpr)
            return mlir.lower_fun(made, multiple_results=True)(context, *operands)
        with _traced_for(platform):
            return mlir.lower_fun(function, multiple_results=True)(context, *operands)


mlir.register_lowering(_per_platform, _lower)
for _name in (CUDA, ROCM):
    mlir.register_lowering(_per_platform, functools.partial(_lower, platform=_name), platform=_name)


def _batch(operands: Any, axes: Any, *, jaxpr: Any, traced_for: str, function: Any) -> Any:
    mapped = per_platform(jax.vmap(function, in_axes=axes, out_axes=0))
    with _traced_for(traced_for):
        found = mapped(*operands)
    return found, [0] * len(found)


batching.primitive_batchers[_per_platform] = _batch
