"""JAX's modes in which wavejax computes, whatever modes the caller's program has set."""

import contextlib
from collections.abc import Iterator

import jax

from pallas_kernels.modes import standard_modes


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Compute in JAX's standard modes, in this thread, until it ends.

    A program that sets 64-bit types gets the same compiled programs, and so the same tokens, as one
    that does not; one that forbids implicit transfers, promotions or broadcasts forbids its own,
    not the few that are meant here. Modes that only look for mistakes, as `jax_debug_nans`, stay.
    """
    with standard_modes(), jax.transfer_guard("allow"):
        yield
