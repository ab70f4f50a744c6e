"""A kernel's call: Pallas traces it, `translate` writes it, XLA's Triton or `stock` compiles it."""

import functools
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.own_triton import stock
from pallas_kernels.own_triton._jax_internals import batching, core, launcher, mlir
from pallas_kernels.own_triton.translate import Kernel

# Operands: arrays. Parameters: `kernel`, and `avals`, shape and dtype of each result.
launch_p = core.Primitive("own_triton_call")
launch_p.multiple_results = True

# Where no GPU is there to ask: compile for these.
_ARCHITECTURES = {"cuda": 90, "rocm": "gfx942"}
_BACKENDS = {"cuda": "cuda", "rocm": "hip"}
# The environment variable that chooses for a whole process (`triton_route`), and its value for
# texts that the package `triton` compiles, not XLA's own Triton.
VARIABLE, STOCK = "WAVEJAX_TRITON", "stock"
XLA_TARGET = "__gpu$xla.gpu.triton"
# Bytes that each array's address is a multiple of; jaxlib looks at each launch.
_ALIGNMENT = 16


def pallas_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int, name: str, **settings: Any
) -> Callable[..., Any]:
    """Return what `pl.pallas_call` does, for GPUs and without Pallas' own backends.

    Args:
        kernel: of refs.
        num_warps, num_stages: see Triton.
        name: the kernel's.
        settings: others of `pl.pallas_call`.
    """
    trace = traced(kernel, num_warps=num_warps, num_stages=num_stages, name=name, **settings)

    def call(*operands: Any) -> Any:
        made, avals, tree = trace(*operands)
        results = launch_p.bind(*jax.tree.leaves(operands), kernel=made, avals=avals)
        return jax.tree.unflatten(tree, results)

    return call


def traced(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int, name: str, **settings: Any
) -> Callable[..., tuple[Kernel, tuple[Any, ...], Any]]:
    """Return what traces a kernel: from operands to the kernel, its results' avals, their tree.

    Args:
        kernel, num_warps, num_stages, name, settings: see `pallas_call`.
    """
    function = pl.pallas_call(kernel, name=name, **settings)

    def trace(*operands: Any) -> tuple[Kernel, tuple[Any, ...], Any]:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
        [found] = _calls(jaxpr.jaxpr)
        shapes_of_refs = [var.aval.shape for var in found.params["jaxpr"].invars]
        arrays = [var.aval.shape for var in (*found.invars, *found.outvars)]
        if shapes_of_refs != arrays:
            raise NotImplementedError(
                f"{name}: a kernel gets blocks of its arrays (BlockSpec), or memory of its own; by "
                "wavejax's own way it gets whole arrays alone"
            )
        made = Kernel(
            name=name,
            jaxpr=found.params["jaxpr"],
            grid=tuple(int(programs) for programs in found.params["grid_mapping"].grid),
            num_warps=num_warps,
            num_stages=num_stages,
            aliases=tuple(found.params["input_output_aliases"]),
        )
        avals = tuple(var.aval for var in found.outvars)
        return made, avals, jax.tree.structure(shapes)

    return trace


def _calls(jaxpr: Any) -> Iterator[Any]:
    """Find the equations of a jaxpr that call a kernel, in calls of functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from _calls(inner)


@launch_p.def_impl
def _run(*operands: Any, **parameters: Any) -> Any:
    with jax.disable_jit(False):  # or else it would come here again
        return jax.jit(functools.partial(launch_p.bind, **parameters))(*operands)


@launch_p.def_abstract_eval
def _avals(*_: Any, avals: Any, kernel: Kernel) -> Any:
    del kernel
    return avals


def _lower(context: Any, *operands: Any, kernel: Kernel, avals: Any, platform: str) -> Any:
    del avals
    if os.environ.get(VARIABLE) != STOCK:
        return _lower_by_xla(context, *operands, kernel=kernel, platform=platform)
    arrays = len(operands) + len(context.avals_out)
    return jax.ffi.ffi_lowering(
        "triton_kernel_call_ffi", operand_output_aliases=dict(kernel.aliases)
    )(context, *operands, name=kernel.symbol, opaque=_launch(kernel, arrays, platform))


def _lower_by_xla(context: Any, *operands: Any, kernel: Kernel, platform: str) -> Any:
    """Hand the kernel's text to XLA, whose Triton compiles it, as it does what JAX writes."""
    grid = dict(zip(("grid_x", "grid_y", "grid_z"), kernel.launch_grid, strict=True))
    numbers = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **grid}
    return jax.ffi.ffi_lowering(XLA_TARGET, operand_output_aliases=dict(kernel.aliases))(
        context,
        *operands,
        name=kernel.symbol,
        ir=kernel.text(platform),
        debug=False,
        **{name: np.int32(number) for name, number in numbers.items()},
    )


def _refuse(*_: Any, kernel: Kernel, **__: Any) -> Any:
    raise NotImplementedError(
        f"{kernel.name} is a kernel for GPUs: interpret it, or give implementation='xla'"
    )


mlir.register_lowering(launch_p, _refuse)
for _platform in _BACKENDS:
    mlir.register_lowering(
        launch_p, functools.partial(_lower, platform=_platform), platform=_platform
    )


def _launch(kernel: Kernel, arrays: int, platform: str) -> bytes:
    """Tell jaxlib of a launch: the kernel's code, its grid, what it is handed."""
    if platform != "cuda":
        raise NotImplementedError(
            f"{VARIABLE} is {STOCK}, which does not launch kernels on {platform}: leave it out, or "
            "set WAVEJAX_IMPLEMENTATION=xla for plain JAX"
        )
    architecture = _architecture(platform)
    text = kernel.text(platform)
    made = stock.compile_text(
        text, _BACKENDS[platform], architecture, kernel.num_warps, kernel.num_stages
    )
    jaxlib = launcher()
    code = jaxlib.TritonKernel(
        kernel.symbol, made.num_warps, 1, made.shared, made.code, text, architecture
    )
    # After its own parameters Triton's kernel has pointers to memory that ours do without. jaxlib
    # gives two, which are null; a version of Triton's that wants more finds more.
    nothing = [jaxlib.create_scalar_parameter(0, "u64") for _ in range(2)]
    parameters = [jaxlib.create_array_parameter(0, _ALIGNMENT) for _ in range(arrays)] + nothing
    call = jaxlib.TritonKernelCall(code, *kernel.launch_grid, parameters)
    return zlib.compress(call.to_proto(kernel.symbol, b""))


def _architecture(platform: str) -> Any:
    """Name the architecture of JAX's GPU, or a likely one where there is none."""
    if jax.default_backend() != "gpu":
        return _ARCHITECTURES[platform]
    found = str(jax.devices()[0].compute_capability)
    return int(found.replace(".", "")) if platform == "cuda" else found


def _batch(operands: Any, axes: Any, **parameters: Any) -> Any:
    mapped = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    chosen = [axis is not None for axis in axes]

    def of_one(row: Any) -> Any:
        left = iter(row)
        return launch_p.bind(
            *(next(left) if choose else x for x, choose in zip(mapped, chosen, strict=True)),
            **parameters,
        )

    found = jax.lax.map(of_one, [x for x, choose in zip(mapped, chosen, strict=True) if choose])
    return found, [0] * len(found)


batching.primitive_batchers[launch_p] = _batch
