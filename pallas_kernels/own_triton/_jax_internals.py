"""What is taken of JAX that JAX does not promise to keep. All other files ask here."""

from typing import Any

from jax._src import effects
from jax._src.pallas import core as pallas_core
from jax._src.pallas import primitives as _primitives
from jax._src.state.indexing import NDIndexer, Slice
from jax._src.state.types import ReadEffect, WriteEffect
from jax.extend import core
from jax.interpreters import batching, mlir

__all__ = [
    "NDIndexer",
    "ReadEffect",
    "Slice",
    "WriteEffect",
    "batching",
    "core",
    "launcher",
    "load",
    "local_effect",
    "mlir",
    "scan_sizes",
    "store",
]


def load(ref: Any, *, mask: Any = None, other: Any = None) -> Any:
    """Load from a ref: all of it, or of what `ref.at[...]` names.

    Args:
        ref: of a kernel.
        mask: bool, of what is loaded; the rest is `other`.
        other: see `mask`.
    """
    return _primitives.load(ref, None, mask=mask, other=other)


def store(ref: Any, value: Any, *, mask: Any = None) -> None:
    """Store to a ref: see `load`."""
    _primitives.store(ref, None, value, mask=mask)


def local_effect(name: str) -> Any:
    """Make an effect that a kernel may have, in loops too, and that its call does not have."""
    kind = type(name, (effects.Effect,), {})
    pallas_core.kernel_local_effects.add_type(kind)
    effects.control_flow_allowed_effects.add_type(kind)
    return kind()


def scan_sizes(params: Any) -> tuple[int, int]:
    """Count what a scan's body takes of outside, and what it carries, by the equation's params."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From JAX 0.11 on.
    constants, carried, _ = (len(group) for group in params["ft_in"].unpack())
    return constants, carried


def launcher() -> Any:
    """Import jaxlib's way to launch kernels on CUDA, which registers it with XLA too.

    Raises:
        RuntimeError: jaxlib has none here.
    """
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernelCall"):
        raise RuntimeError(
            "wavejax's own way to run kernels on a GPU wants JAX's plugin for CUDA: "
            "pip install 'wavejax[cuda13]'"
        )
    return gpu_triton
