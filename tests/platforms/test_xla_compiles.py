"""Kernels and steps compiled for an H200 by the compiler of JAX's CUDA plugin, without a GPU.

It is what a GPU machine does with a program, up to running it. XLA has a Triton of its own: one
kernel that stock `triton` compiled broke it down, and JAX with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.described_products import PRODUCTS
from tests.support.described_steps import ATTENTIONS
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.platform_packages import package_folder

ROOT = Path(__file__).parents[2]
# By module: the names that it prints, each when its programs are compiled.
COMPILED = {
    "described_gpu": [*kernel_cases(ALL_HEADS[0])],
    "described_steps": [*ATTENTIONS],
    "described_products": [*PRODUCTS],
}


@pytest.mark.slow(200)
@pytest.mark.parametrize("module", COMPILED)
def test_xla_compiles_for_an_h200(module):
    folder = package_folder("jax_cuda13_plugin")
    path = [str(ROOT), *([] if folder is None else [str(folder)])]
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    # The one after the last that was printed is the one that failed.
    assert done.stdout.split() == COMPILED[module], done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
