"""What there is of memory: asked of the device and the system, and XLA's limits of it."""

import dataclasses
import os
from pathlib import Path

import jax
import psutil

from models.parameters import Params

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
DEVICE_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_DEVICE_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT_PINNED_LIMIT = 64 * 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class FreeMemory:
    """Bytes that a run may take.

    Attributes:
        device: of the device's own memory; None where that is the host's, as on a CPU.
        host: of the host's memory.
        pinned: the most that XLA will pin of it.
        name: the device's.
    """

    device: int | None
    host: int
    pinned: int = _DEFAULT_PINNED_LIMIT
    name: str = "cpu"


def free_memory() -> FreeMemory:
    """Asks JAX and the system; starts the device."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    own = None
    if stats is not None and "bytes_limit" in stats:
        # What XLA set aside for this process as it started: not all that the device has.
        own = stats["bytes_limit"] - stats["bytes_in_use"]
    limit = os.environ.get(PINNED_LIMIT, "")
    pinned = int(limit) * 2**30 if limit.isdigit() else _DEFAULT_PINNED_LIMIT
    return FreeMemory(own, host_available(), pinned, getattr(device, "device_kind", "device"))


def free_besides(params: Params) -> FreeMemory:
    """Tell what would be free without a model's weights, which are loaded: a plan counts them."""
    free, weights = free_memory(), sum(x.nbytes for x in jax.tree.leaves(params))
    if free.device is None:
        return dataclasses.replace(free, host=free.host + weights)
    return dataclasses.replace(free, device=free.device + weights)


def host_available() -> int:
    """Bytes of host memory that this process may take: the system's, or its container's."""
    available = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((_CGROUP / limit).read_text())
            now = int((_CGROUP / used).read_text())
            stat = (_CGROUP / limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue  # no such limit, or "max"
        # Files that were read count as used, and are dropped when memory is wanted.
        kept = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
        available = min(available, most - now + int(kept.get(cache, 0)))
    return max(0, available)


def set_memory_limits(pinned_bytes: int) -> None:
    """Lets XLA pin so much host memory, and take nine tenths of a GPU's memory.

    Must come before JAX's first use of a device, and changes nothing that the user has set. XLA
    pins memory in powers of two as far as its limit lets it: a limit just above the need keeps it
    from pinning, for a store of 33 GiB, another 31.
    """
    os.environ.setdefault(PINNED_LIMIT, str(-(-pinned_bytes // 2**30)))
    if not {DEVICE_FRACTION, _OLD_DEVICE_FRACTION} & os.environ.keys():
        # XLA's own default is three quarters.
        os.environ[DEVICE_FRACTION] = "0.9"
