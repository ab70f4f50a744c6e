"""Every kernel compiled for an H200 by the compiler of JAX's CUDA plugin, without a GPU.

It is what a GPU machine does with a kernel, up to running it. XLA has a Triton of its own: one
kernel that stock `triton` compiled broke it down, and JAX with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.platform_packages import package_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow(300)
def test_xla_compiles_all_kernels_for_an_h200():
    folder = package_folder("jax_cuda13_plugin")
    path = [str(ROOT), *([] if folder is None else [str(folder)])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.described_gpu"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    # The case after the last one printed is the one that failed.
    assert done.stdout.split() == list(kernel_cases(ALL_HEADS[0])), done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
