"""Kernels by Mosaic GPU on any machine: Pallas' interpreter of them, and its detector of races."""

import contextlib
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import pytest

from pallas_kernels import mosaic_gpu_route
from pallas_kernels._compat import JAX_VERSION

needs_interpreter = pytest.mark.skipif(
    JAX_VERSION < (0, 11), reason="JAX 0.10 interprets no layouts of registers"
)


def interpret(function: Callable[..., Any], *operands: Any, races: bool = False) -> Any:
    """What a function makes that calls kernels with `interpret=True`; fails if copies race.

    Shared memory is NaN at the start, as is what a kernel did not write.

    Args:
        function: to be jitted.
        operands: of the function.
        races: whether programs may write the same to the same places: no race is looked for then.
    """
    told = io.StringIO()
    detector = mock.patch.object(mosaic_gpu_route, "detect_races", not races)
    # From 0.12 on JAX raises an error; before, it prints.
    with detector, contextlib.redirect_stdout(told):
        found = jax.block_until_ready(jax.jit(function)(*operands))
    assert "RACE DETECTED" not in told.getvalue(), told.getvalue()[:2000]
    return found
