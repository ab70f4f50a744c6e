"""Compiles for an H200 that is described, by the compiler that JAX has on a GPU machine.

A process of its own: it needs the folder of JAX's CUDA plugin on its path, and the compiler may
take the process with it. Compiled, not run.

    python -m tests.support.described_gpu CASE ...

prints the name of each case of `kernel_cases` when it is compiled.
"""

import functools
import sys
from typing import Any

import numpy as np
from jax._src import compiler, xla_bridge
from jax._src.lib import _jax, xla_client
from jax.experimental import topologies

from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.lowering import lowered_for

# What XLA asks of a GPU, in its `GpuTargetConfigProto`.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  device_memory_size: 150000000000  l2_cache_size: 62914560
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def device() -> Any:
    """An H200 that programs can be compiled for, and not run on."""
    xla_bridge._discover_and_register_pjrt_plugins()
    xla_client.initialize_pjrt_plugin("cuda")
    topology = _jax.get_default_c_api_topology(
        "cuda", "h200", {"topology": "1x1x1", "target_config": H200}
    )
    [found] = topologies.TopologyDescription(topology._make_compile_only_devices()).devices
    return found


def compiled(function: Any, *operands: Any) -> Any:
    """The compiled program of a function of arrays: of shapes, or of arrays in their memories.

    Lowered for this machine's device, which knows a host's memory, and compiled for the H200:
    a shape that is placed there cannot say in which memory it is.
    """
    module = lowered_for("cuda", function, *operands).compiler_ir("stablehlo")
    options = compiler.get_compile_options(1, 1, device_assignment=np.zeros((1, 1), int))
    return device().client.compile(module, _jax.DeviceList((device(),)), options)


def main(names: list[str]) -> None:
    """Compile the cases of these names, or all."""
    cases = kernel_cases(ALL_HEADS[0])
    for name in names or cases:
        # Of a function that has no other name, so that no program is taken from JAX's cache.
        compiled(functools.partial(cases[name].function), *cases[name].operands)
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
