"""Our own way through Triton on a CUDA GPU, for a JAX whose Triton backend is gone.

The ops' own tests run in a process of its own, where nothing can import that backend. All tests on
a GPU by this route: `python -m pytest -p tests.support.without_triton tests/gpu`
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

# By op: rows on the device with a row cache, in pinned host memory, and without a row cache.
STEPS = "(llama-bfloat16-device or qwen-float16-host or qwen-bfloat16-device-no_cache)"
TESTS = {
    "test_ops_on_gpu.py": f"(TestOps and {STEPS}) or test_each_zone_alone or test_merge_states",
    "test_step_on_gpu.py": "llama",
    "test_append_on_gpu.py": "test_append_rows",
    "test_dense_on_gpu.py": "llama and bfloat16",
    "test_moments_on_gpu.py": "int8 and (llama or qwen-float16)",
    "test_index_on_gpu.py": "bfloat16",
}

# After the tests: the route was ours, and each kernel was written by it.
REPORT = """
import sys, pytest
import tests.support.without_triton  # before anything imports the backend
from pallas_kernels.own_triton.translate import Kernel
written, text = [], Kernel.text
Kernel.text = lambda *given: written.append(1) or text(*given)
code = pytest.main(sys.argv[1:])
print("kernels written:", len(written))
assert not [name for name in sys.modules if name.startswith("jax._src.pallas.triton")]
sys.exit(code)
"""


@pytest.mark.parametrize("route", ["own", pytest.param("stock", marks=pytest.mark.slow(200))])
@pytest.mark.parametrize("file", TESTS)
def test_ops_without_jaxs_triton_backend(file, route, tmp_path):
    if route == "stock" and importlib.util.find_spec("triton") is None:
        pytest.skip("this route wants the package triton, which is not installed")
    arguments = ["-p", "tests.support.without_triton", "-p", "no:cacheprovider", "-q"]
    arguments += [f"tests/gpu/{file}", "-k", TESTS[file]]
    environment = os.environ | {
        "WAVEJAX_TRITON": route,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert " passed" in done.stdout, said
    assert "kernels written: 0" not in done.stdout, said
