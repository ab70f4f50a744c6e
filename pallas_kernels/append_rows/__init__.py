"""The op `append_rows`. Its meaning is in `reference.py`, its kernels are in `triton.py`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Int, Num

from pallas_kernels import dispatch
from pallas_kernels.append_rows import reference, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import Rows


def append_rows(
    store: Rows,
    rows: Num[Array, "kv_heads new 2 head_dim"],
    layer: Int[Array, ""] | int,
    sequence: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    *,
    implementation: Implementation | None = None,
) -> Rows:
    """Write one sequence's new rows into the row store, from token `start` on.

    In place where the store is donated, in host memory as on the device. `start` + new must not
    pass the store's end: XLA would move the whole block back, the kernel would not write it all.

    Args:
        store: all rows, in token order; may lie in `pinned_host` memory.
        rows: the new ones, on the device; converted to the store's dtype, or quantised where the
            store has scales (`rounding.quantise`).
        layer, sequence: int32, where in the stack.
        start: int32, the first row to write.
        implementation: see `pallas_kernels.dispatch.call`. With "auto" the kernel writes to host
            memory only: XLA's update there was slow in the program that reads a prompt
            (docs/lab/benchmarks.md); on the device XLA does well.

    Returns:
        the store with the new rows.

    Raises:
        NotImplementedError: as `pallas_kernels.dispatch.call`.
    """
    implementations: dict[str, Callable[..., Rows]] = {"xla": reference.append_rows}
    on_host = jax.typeof(store.data).memory_space == jax.memory.Space.Host
    if on_host or dispatch.requested(implementation) != "auto":
        implementations["triton"] = triton.append_rows
    return dispatch.call(
        "append_rows",
        implementation,
        implementations,
        store,
        rows,
        layer,
        sequence,
        start,
    )
