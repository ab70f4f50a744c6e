"""A stand-in for Triton's compiler and for jaxlib's plugin: own launches lower without either."""

import dataclasses
import json
import zlib
from typing import Any

from pallas_kernels.own_triton.stock import Assembly


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    name: str
    num_warps: int
    num_ctas: int
    shared: int
    code: str
    text: str
    compute_capability: int


@dataclasses.dataclass(frozen=True)
class TritonKernelCall:
    kernel: TritonKernel
    grid_x: int
    grid_y: int
    grid_z: int
    parameters: list[Any]

    def to_proto(self, name: str, metadata: bytes) -> bytes:
        assert metadata == b""
        return json.dumps(dataclasses.asdict(self) | {"call": name}).encode()


def create_array_parameter(bytes_to_zero: int, divisibility: int) -> Any:
    return ["array", bytes_to_zero, divisibility]


def create_scalar_parameter(value: int, dtype: str) -> Any:
    return ["scalar", value, dtype]


def compile_text(text: str, backend: str, architecture: Any, warps: int, stages: int) -> Assembly:
    return Assembly(f"{backend} {architecture} {warps} {stages}", 1234, warps)


def install(patch: Any) -> None:
    """Puts these in their places, by pytest's `MonkeyPatch`."""
    import tests.support.recorded_launches as this
    from pallas_kernels.own_triton import call, stock

    patch.setenv("WAVEJAX_TRITON", "stock")
    patch.setattr(stock, "compile_text", compile_text)
    patch.setattr(call, "launcher", lambda: this)


def launch_of(opaque: bytes) -> dict[str, Any]:
    """What a lowered call says of its launch."""
    said: dict[str, Any] = json.loads(zlib.decompress(opaque))
    return said
