"""Our own way from Pallas' kernels to GPUs, for a JAX without its Triton backend.

Pallas traces a kernel; we translate what it traced to Triton's intermediate language; XLA's own
Triton compiles that, as it does what JAX's backend writes. By `WAVEJAX_TRITON=stock`, for an XLA
that has none, the package `triton` makes PTX and jaxlib launches it. Only what our kernels hold is
translated. `pallas_kernels.backend` chooses between this and JAX's backend.
"""

from pallas_kernels.own_triton._jax_internals import load, store
from pallas_kernels.own_triton.call import pallas_call
from pallas_kernels.own_triton.primitives import atomic_add, debug_barrier, inline_assembly

__all__ = ["atomic_add", "debug_barrier", "inline_assembly", "load", "pallas_call", "store"]
