"""Kernels for TPUs on any machine: Pallas' interpreter of them, and its detector of races."""

import importlib
from collections.abc import Callable
from typing import Any

import jax


def interpret(function: Callable[..., Any], *operands: Any) -> Any:
    """What a function makes that calls one kernel with `interpret=True`; fails if copies race.

    What the kernel did not write is NaN, as is all of its own memory at the start.
    """
    found = jax.block_until_ready(jax.jit(function)(*operands))
    assert not races_found(), "a copy and the program touch the same memory at once: see above"
    return found


def races_found() -> bool:
    """Whether the interpreter saw a race in the kernel that it ran last; it prints them."""
    # JAX tells it nowhere else, but in what is printed.
    state = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    assert state is not None, "no kernel was interpreted"
    return bool(state.races_found)
