"""The table of rules: which function lowers which of JAX's primitives."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from pallas_kernels.own_triton.writer import Value, Writer

Rule = Callable[..., Any]

# By the primitive's name.
RULES: dict[str, Rule] = {}


class Equation(NamedTuple):
    """An equation of a kernel, as rules see it.

    Attributes:
        params: the primitive's.
        inputs: what each operand is: a `Value`, or a `Ref`.
        avals: the operands' shapes and dtypes.
        out_avals: the results'.
        used: which results anything reads.
    """

    params: dict[str, Any]
    inputs: list[Any]
    avals: list[Any]
    out_avals: list[Any]
    used: list[bool]


@runtime_checkable
class Translator(Protocol):
    """What a rule may ask of the one that walks the kernel."""

    writer: Writer

    def translate(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """Write a jaxpr's equations; returns what its results are."""

    def program_id(self, axis: int) -> Value:
        """Return the program's number along an axis of the grid."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of primitives: of a translator and an equation, to its results.

    A rule of a primitive with one result returns it, not in a list.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def is_float(aval: Any) -> bool:
    """Say whether numbers are floats."""
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


def is_signed(aval: Any) -> bool:
    """Say whether numbers are integers with a sign."""
    return bool(jnp.issubdtype(aval.dtype, jnp.signedinteger))


def broadcast_inputs(at: Translator, equation: Equation) -> Iterator[Value]:
    """Give each operand the result's shape: JAX leaves scalars beside tensors."""
    for value in equation.inputs:
        yield at.writer.broadcast(value, equation.out_avals[0].shape)
