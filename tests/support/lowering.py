"""Lowers functions for a GPU or a TPU that is not there."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir

from pallas_kernels._compat import JAX_VERSION


def lower_for(platform: str, function: Any, *args: Any) -> str:
    """The text of what `lowered_for` returns."""
    return lowered_for(platform, function, *args).as_text()


def lowered_for(platform: str, function: Any, *args: Any) -> Any:
    """The program that `function` becomes on "cuda", "rocm" or "tpu", kernels and all.

    Args:
        function: to be jitted.
        args: arrays, or `jax.ShapeDtypeStruct`.
    """
    with contextlib.ExitStack() as stack:
        if JAX_VERSION >= (0, 11) and platform != "tpu":
            # From 0.11 on, Pallas asks which GPU it lowers for.
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

            device = AbstractDevice("NVIDIA H200", 132, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))


class TritonKernel(NamedTuple):
    """One launch of a kernel in a lowered program.

    Attributes:
        name: the kernel's.
        module: in Triton's intermediate language, without the places in the source.
        num_warps, num_stages: see Triton.
    """

    name: str
    module: str
    num_warps: int
    num_stages: int


def triton_kernels(program: str) -> list[TritonKernel]:
    """The kernels that a lowered program launches, in their order.

    Args:
        program: from `lower_for`, by JAX's Triton backend.
    """
    # Not above: tests of our own route do without it.
    from jax._src.pallas.triton import lowering as triton_lowering

    with mlir.make_ir_context():
        launches = [
            ir.DictAttr(call.attributes["mhlo.backend_config"])
            for call in _operations(ir.Module.parse(program).operation)
            if call.name == "stablehlo.custom_call"
            and ir.StringAttr(call.attributes["call_target_name"]).value.endswith("gpu.triton")
        ]
        found = [
            (
                ir.StringAttr(launch["name"]).value,
                ir.StringAttr(launch["ir"]).value_bytes,
                ir.IntegerAttr(launch["num_warps"]).value,
                ir.IntegerAttr(launch["num_stages"]).value,
            )
            for launch in launches
        ]
    with triton_lowering._new_ir_context():
        return [
            TritonKernel(name, ir.Module.parse(code).operation.get_asm(), warps, stages)
            for name, code, warps, stages in found
        ]


def triton_modules(program: str) -> dict[str, list[str]]:
    """By kernel, the modules of `triton_kernels`."""
    modules = collections.defaultdict(list)
    for kernel in triton_kernels(program):
        modules[kernel.name].append(kernel.module)
    return dict(modules)


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)
