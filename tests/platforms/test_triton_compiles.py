"""Every kernel compiled to machine code for AMD's GPUs, which are not there, by stock `triton`.

JAX gives the kernels in Triton's intermediate language; what JAX does with them on a GPU, Triton's
own compiler does here without one. Compiled, not run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.select_clusters import _config as select_clusters_config
from tests.support import kernel_cases as kernel_cases_of_all_ops
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.lowering import lower_for, triton_kernels
from tests.support.platform_packages import import_package

pytestmark = pytest.mark.slow(300)

# Architectures with a warp's threads. Of NVIDIA's one is compiled by XLA, `test_xla_compiles.py`.
TARGETS = {"gfx942": 64, "gfx1100": 32}
HEADS = ALL_HEADS[0]


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """The package; what it compiles goes to a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield import_package("triton", patch)


def compiled(triton, kernel, target, folder):
    """The machine code of a kernel, `triton_kernels`' way of launching it kept."""
    path = folder / f"{kernel.name}.ttir"
    path.write_text(kernel.module)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return triton.compile(str(path), target=target, options=options)


def test_all_kernels_compile(triton, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget

    # Two kernels hold all clusters of a row in registers: with as many as an NVIDIA GPU is given,
    # AMD's compiler takes minutes for them.
    monkeypatch.setattr(kernel_cases_of_all_ops, "CLUSTERS", 1024)
    monkeypatch.setattr(select_clusters_config, "MOST_IN_REGISTERS", 2048)
    # Each kernel once: with all of their variants, which told nothing new, it takes twice as long.
    kernels = {}
    for case in kernel_cases(HEADS).values():
        # A case is lowered only if it launches what no case before it did.
        if case.kernels - kernels.keys():
            lowered = triton_kernels(lower_for("rocm", case.function, *case.operands))
            kernels = {kernel.name: kernel for kernel in lowered} | kernels
    assert len(kernels) >= 24
    for name, threads in TARGETS.items():
        for kernel in kernels.values():
            made = compiled(triton, kernel, GPUTarget("hip", name, threads), tmp_path)
            assert made.asm["hsaco"], f"{kernel.name} for {name}"
            # A program's shared memory is 64 KB at most.
            assert made.metadata.shared <= 64 * 1024, f"{kernel.name} for {name}"


def test_cudas_assembly_does_not_compile_for_amd(triton, tmp_path):
    """So a kernel that keeps it, lowered for AMD's GPUs, would be found here."""
    case = kernel_cases(HEADS)["select_clusters-few"]
    kernels = triton_kernels(lower_for("cuda", case.function, *case.operands))
    [kernel] = [kernel for kernel in kernels if kernel.name == "list_clusters"]
    assert "inline_asm" in kernel.module
    path = tmp_path / "kernel.ttir"
    path.write_text(kernel.module)
    # In a process of its own: LLVM may end the one in which it meets assembly of another machine.
    program = (
        "import triton; from triton.backends.compiler import GPUTarget; "
        f"triton.compile({str(path)!r}, target=GPUTarget('hip', 'gfx942', 64)); print('compiled')"
    )
    folder = Path(triton.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "compiled" not in done.stdout
    assert "error: invalid instruction" in done.stderr, done.stderr[-2000:]
