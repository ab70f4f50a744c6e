"""The door to Pallas' Mosaic GPU backend, for kernels of NVIDIA's GPUs.

JAX calls it unstable, and imports it slowly: it is imported when a kernel is traced.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels import _compat

# How a kernel is interpreted. A test of programs that write the same place may turn it off.
detect_races = True


@functools.cache
def api() -> Any:
    """Import JAX's module of Mosaic GPU.

    Raises:
        NotImplementedError: this JAX has none that can be imported.
    """
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NotImplementedError(f"JAX's Mosaic GPU cannot be imported: {error}") from error
    return mosaic_gpu


def call(
    body: Callable[..., None],
    *,
    results: Any,
    scratch: tuple[Any, ...],
    grid: Mapping[str, int],
    name: str,
    interpret: bool,
) -> Callable[..., Any]:
    """Return a kernel as a function of arrays. Its programs have 128 threads, one warpgroup.

    Args:
        body: of the operands' refs, the results' and the scratch memory's. It says by hand which
            layouts registers have, where they are not those of the operands.
        results: list of `jax.ShapeDtypeStruct`.
        scratch: shared memory, and barriers.
        grid: programs along each axis; `lax.axis_index` of its name tells which.
        name: of the kernel, for profiles.
        interpret: run it as plain JAX on any platform, by `detect_races`. For tests.
    """
    mgpu = api()
    settings = (
        {"interpret": mgpu.InterpretGPUParams(detect_races=detect_races)} if interpret else {}
    )
    function: Callable[..., Any] = mgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=mgpu.CompilerParams(
            approx_math=True,
            # The least that sums across warps take; by default it is twice as much.
            reduction_scratch_bytes=1024,
            lowering_semantics=mgpu.LoweringSemantics.Lane,
        ),
        **settings,
    )
    return function


def load(ref: Any, layout: Any) -> Any:
    """Load what a ref holds into registers, in a layout of `api().Layout`."""
    return _compat.mosaic_gpu_load(api(), ref, layout)


def store(ref: Any, value: Any) -> None:
    """Store registers of the ref's shape, whatever their layout."""
    _compat.mosaic_gpu_store(api(), ref, value)


def products(a: Any, b: Any) -> Any:
    """Multiply matrices in shared memory, `[m, k]` and `[k, n]`, by the warpgroup's instruction.

    Args:
        a, b: refs of one 16-bit dtype, tiled and swizzled; m is a multiple of 64, n of 8.

    Returns:
        `[m, n]` float32, of layout `WGMMA`.
    """
    mgpu = api()

    def multiply(sums: Any) -> Any:
        mgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, mgpu.ACC((a.shape[0], b.shape[1])))
