"""Our own way from Pallas' kernels to NVIDIA's GPUs, for a JAX without its Triton backend.

Pallas traces a kernel; we translate what it traced to Triton's intermediate language; the stock
`triton` package makes PTX of that; jaxlib launches it. Only what our kernels hold is translated.
`pallas_kernels.backend` chooses between this and JAX's backend.
"""

from pallas_kernels.own_triton._jax_internals import load, store
from pallas_kernels.own_triton.call import pallas_call
from pallas_kernels.own_triton.primitives import atomic_add, debug_barrier, inline_assembly

__all__ = ["atomic_add", "debug_barrier", "inline_assembly", "load", "pallas_call", "store"]
