"""Kernels and steps compiled for an H200 by the compiler of JAX's CUDA plugin, without a GPU.

It is what a GPU machine does with a program, up to running it. XLA has a Triton of its own: one
kernel that stock `triton` compiled broke it down, and JAX with it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.described_piece import LAYERS
from tests.support.described_products import PRODUCTS
from tests.support.described_rows import FORMATS
from tests.support.described_steps import ATTENTIONS
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.platform_packages import package_folder

ROOT = Path(__file__).parents[2]
# By module: the names that it prints, each when its programs are compiled.
COMPILED = {
    "described_gpu": [*kernel_cases(ALL_HEADS[0])],
    # The default's step is compiled below, by both routes.
    "described_steps": [name for name in ATTENTIONS if name != "wave"],
    "described_products": [*PRODUCTS],
}


def compile_all(module, *names, **variables):
    """Run a module that compiles, in a process of its own."""
    folder = package_folder("jax_cuda13_plugin")
    path = [str(ROOT), *([] if folder is None else [str(folder)])]
    variables = {"PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", *names],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow(200)
@pytest.mark.parametrize("module", COMPILED)
def test_xla_compiles_for_an_h200(module):
    done = compile_all(module, *COMPILED[module])
    # The one after the last that was printed is the one that failed.
    assert done.stdout.split() == COMPILED[module], done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]


def launches(folder, program="step"):
    """Of a program that XLA has written to a folder: what is launched, by kind, with its depth."""
    [path] = folder.glob(f"*jit_*{program}*thunk_sequence_after_thunk_passes.txt")
    lines = path.read_text().splitlines()
    return [line.split("[")[0] for line in lines if " k" in line or ": k" in line]


def instructions(folder):
    """By kernel's name, how many instructions of PTX a step's has."""
    found = {}
    for path in folder.glob("*jit_step*.ptx"):
        text = path.read_text()
        for kernel in re.finditer(r"\.visible \.entry (\w+)\(.*?\n\}", text, re.DOTALL):
            found[kernel[1]] = len(
                re.findall(r"^\t\s*(?:@!?%p\d+ )?[a-z]", kernel[0], re.MULTILINE)
            )
    return found


@pytest.mark.slow(40)
def test_our_own_texts_become_what_jaxs_do(tmp_path):
    """In CUDA graphs like JAX's kernels, and of the same length but for the index's four."""
    found = {}
    for route in ("jax", "own"):
        dump = f"--xla_dump_to={tmp_path / route} --xla_dump_hlo_as_text"
        done = compile_all("described_steps", "wave", WAVEJAX_TRITON=route, XLA_FLAGS=dump)
        assert done.stdout.split() == ["wave"], done.stderr[-2000:]
        found[route] = launches(tmp_path / route), instructions(tmp_path / route)
    (jaxs, jax_lengths), (own, own_lengths) = found["jax"], found["own"]
    assert not [line for line in own if "kCustomCall" in line]
    assert sorted(line.split(":")[1] for line in own) == sorted(line.split(":")[1] for line in jaxs)
    assert own_lengths.keys() == jax_lengths.keys() >= {"attend_zones", "pick_rows"}
    differ = {name for name, length in own_lengths.items() if length != jax_lengths[name]}
    assert differ <= {"assign_tokens", "average_pieces", "cut_clusters", "move_centroids"}
    assert all(own_lengths[name] <= jax_lengths[name] for name in differ)


@pytest.mark.slow(20)
def test_a_piece_of_appended_tokens_is_one_cuda_graph(tmp_path):
    done = compile_all(
        "described_piece", XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    )
    assert done.stdout.split() == ["piece"], done.stderr[-2000:]
    graph, *within = launches(tmp_path, "append_short")
    assert "kCommandBuffer" in graph
    assert all(line.startswith("    ") for line in within)
    # Twelve a layer, and some before and after the layers. Its state is copied, as none is donated.
    kernels = [line for line in within if "kCustomKernel" in line]
    assert len(kernels) <= 12 * LAYERS + 10


@pytest.mark.slow(20)
def test_a_step_of_one_sequence_is_fewer_kernels_as_two_rows():
    done = compile_all("described_rows")
    found = {
        name: [float(x) for x in counts]
        for name, *counts in map(str.split, done.stdout.splitlines())
    }
    assert found.keys() == set(FORMATS), done.stderr[-2000:]
    # A layer's: a norm is one kernel for two, and int8's products take no padding.
    for name, fewer in (("bfloat16", 3), ("int8", 8)):
        one, two = found[name]
        assert two <= one - fewer, found
