"""Picks an op's implementation."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from pallas_kernels.toolbox import launch

# The least compute capability that has the kernels' instructions.
OLDEST_GPU = (8, 0)

Implementation = Literal["xla", "triton"]


def call(
    op: str,
    implementation: Implementation | None,
    implementations: dict[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the implementation asked for; with None, the platform's best that supports the case.

    Args:
        op: the op's name, for messages.
        implementation: None picks the kernel on a CUDA GPU where there is one, of compute
            capability 8.0 or later, and falls back to "xla" only where the kernel raises
            NotImplementedError.
        implementations: the op's functions by name; "xla" is always there.

    Raises:
        NotImplementedError: a named implementation does not exist, or does not support the case.
    """
    if implementation is not None:
        if implementation not in implementations:
            known = ", ".join(sorted(implementations))
            raise NotImplementedError(
                f"{op}: no implementation {implementation!r}; there is: {known}"
            )
        return implementations[implementation](*args, **kwargs)
    if "triton" in implementations and _takes_kernels():
        try:
            return implementations["triton"](*args, **kwargs)
        except NotImplementedError:
            pass
    return implementations["xla"](*args, **kwargs)


def _takes_kernels() -> bool:
    """Whether JAX's default device is a GPU, and no NVIDIA one that is too old."""
    if jax.default_backend() != "gpu":
        return False
    capability = launch.compute_capability()
    return capability is None or capability >= OLDEST_GPU
