"""Triton's intermediate language to a GPU's assembly, by the stock `triton` package."""

import functools
import importlib
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

# What the package may be asked for, of each: a fused multiply and add, as XLA's own Triton does;
# and exp of numbers whose result is subnormal, which it does not flush to zero.
_OPTIONS = {"enable_fp_fusion": True, "enable_reflect_ftz": False}

# The version of PTX that is asked for: what CUDA 12.8 reads; 13.0 for GPUs that came later. The
# package's own default is newer than what JAX's `ptxas` reads.
_PTX, _LATER_PTX = 87, 90
_GPUS_OF_PTX = (80, 86, 87, 89, 90, 100, 120)


class Assembly(NamedTuple):
    """What a kernel has become.

    Attributes:
        code: PTX for NVIDIA's GPUs, AMD's assembly for AMD's.
        shared: bytes of shared memory that a program takes.
        num_warps: that a program has.
    """

    code: str
    shared: int
    num_warps: int


# The package has settings of the whole process.
_compiling = threading.Lock()


@functools.cache
def compile_text(
    text: str, backend: str, architecture: int | str, num_warps: int, num_stages: int
) -> Assembly:
    """Compile a kernel; the same one again costs nothing.

    Args:
        text: in Triton's intermediate language.
        backend: "cuda" or "hip".
        architecture: compute capability times ten, or AMD's name such as "gfx942".
        num_warps, num_stages: see Triton.

    Raises:
        ModuleNotFoundError: there is no `triton`.
        RuntimeError: `triton` does not compile the kernel, or it wants memory that nothing gives.
    """
    triton = _package()
    threads = 64 if str(architecture).startswith("gfx9") else 32
    target = triton.compiler.GPUTarget(backend, architecture, threads)
    backend_of_target = triton.compile.make_backend(target)
    options = backend_of_target.parse_options(
        {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "ptx_version": _PTX if architecture in _GPUS_OF_PTX else _LATER_PTX,
            **_OPTIONS,
        }
    )
    stages: dict[str, Any] = {}
    backend_of_target.add_stages(stages, options, triton.compiler.Language.TRITON)
    metadata = {"num_warps": num_warps, **options.__dict__, "target": target}
    context = triton.ir.context()
    with tempfile.TemporaryDirectory() as folder:
        # The package reads files only.
        path = Path(folder) / "kernel.ttir"
        path.write_text(text)
        module = triton.compile.IRSource(str(path), context, backend_of_target).module
    module.context = context
    with _compiling, triton.knobs.compilation.scope():
        # Or else the code names the file, and is another in each process: JAX's cache of compiled
        # programs would never hold it.
        triton.knobs.compilation.disable_line_info = True
        for name, stage in stages.items():
            module = stage(module, metadata)
            if name in ("ptx", "amdgcn"):
                break
    if metadata.get("global_scratch_size"):
        raise RuntimeError("triton wants memory outside of a program for this kernel")
    return Assembly(str(module), metadata["shared"], metadata["num_warps"])


class _Triton(NamedTuple):
    """The modules of the package that are asked."""

    compiler: Any
    compile: Any
    ir: Any
    knobs: Any


def _package() -> _Triton:
    try:
        return _Triton(
            importlib.import_module("triton.backends.compiler"),
            importlib.import_module("triton.compiler.compiler"),
            importlib.import_module("triton._C.libtriton").ir,
            importlib.import_module("triton.knobs"),
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "WAVEJAX_TRITON is stock, which wants the package triton, 3.4 or later: pip install "
            "triton, or leave the variable out"
        ) from error
