"""Rules of control: calls, branches, loops. What is read from outside of a loop is not carried."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels.own_triton._jax_internals import core, scan_sizes
from pallas_kernels.own_triton._rules import Equation, Translator, rule
from pallas_kernels.own_triton.writer import Value, element_of

_ENDS = "arith.maxsi", "arith.minsi"


@rule("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
def _call(at: Translator, equation: Equation) -> list[Any]:
    params = equation.params
    return at.translate(_open(params.get("jaxpr") or params["call_jaxpr"]), equation.inputs)


@rule("cond")
def _cond(at: Translator, equation: Equation) -> list[Value]:
    which, *inputs = equation.inputs
    branches = [_open(branch) for branch in equation.params["branches"]]
    if len(branches) != 2:
        raise NotImplementedError(f"own Triton lowering: {len(branches)} branches")
    writer = at.writer
    first = writer.binary("arith.cmpi eq,", which, writer.constant(0, which.element), "i1")
    results = _results(at, equation.out_avals)
    types = f" -> ({_types(results)})" if results else ""
    writer.line(f"{_named(results)}scf.if {first.name}{types} {{")
    with writer.block():
        _give(at, at.translate(branches[0], inputs))
    writer.line("} else {")
    with writer.block():
        _give(at, at.translate(branches[1], inputs))
    writer.line("}")
    return results


@rule("while")
def _while(at: Translator, equation: Equation) -> list[Value]:
    params, inputs = equation.params, equation.inputs
    test, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test_inputs, inputs = inputs[:of_test], inputs[of_test:]
    body_inputs, carry = inputs[:of_body], inputs[of_body:]
    if not of_test and _counts_up(test, body, of_body):
        return _count_up(at, equation, body, body_inputs, carry)
    # A number that no round changes is not carried.
    changes = [
        after is not before
        for before, after in zip(body.invars[of_body:], body.outvars, strict=True)
    ]
    avals = list(itertools.compress(equation.out_avals, changes))
    writer = at.writer
    results, before, after = _results(at, avals), *(_arguments(at, avals) for _ in range(2))
    types = _types(results)
    started = _started(before, list(itertools.compress(carry, changes)))
    writer.line(f"{_named(results)}scf.while ({started}) : ({types}) -> ({types}) {{")
    with writer.block():
        [goes_on] = at.translate(test, [*test_inputs, *_merged(changes, before, carry)])
        passed = f" {_names(before)} : {types}" if before else ""
        writer.line(f"scf.condition({goes_on.name}){passed}")
    writer.line("} do {")
    if after:
        writer.line(f"^bb0({', '.join(f'{value.name}: {value.type}' for value in after)}):")
    with writer.block():
        found = at.translate(body, [*body_inputs, *_merged(changes, after, carry)])
        found = list(itertools.compress(found, changes))
        unread = [var not in _read(body) for var in body.invars[of_body:]]
        unread = list(itertools.compress(unread, changes))
        pairs = zip(found, after, unread, strict=True)
        _give(at, [_kept(at, new, old) if keep else new for new, old, keep in pairs])
    writer.line("}")
    return _merged(changes, results, carry)


@rule("scan")
def _scan(at: Translator, equation: Equation) -> list[Value]:
    params, inputs = equation.params, equation.inputs
    body = _open(params["jaxpr"])
    constants, carried = scan_sizes(params)
    if params["reverse"] or len(inputs) != constants + carried:
        raise NotImplementedError("own Triton lowering: a scan over arrays")
    if len(equation.out_avals) != carried:
        raise NotImplementedError("own Triton lowering: a scan that stacks results")
    inputs, carry = inputs[:constants], inputs[constants:]
    length = at.writer.constant(params["length"], jnp.int32)
    if carry and _increments(body, constants, 0):
        first, *carry = carry
        last = at.writer.binary("arith.addi", first, length)
        return [last, *_for(at, first, last, body, inputs, carry, equation.out_avals[1:], 0)]
    zero = at.writer.constant(0, jnp.int32)
    return _for(at, zero, length, body, inputs, carry, equation.out_avals, None)


def _count_up(
    at: Translator, equation: Equation, body: Any, inputs: Any, carry: Any
) -> list[Value]:
    """Write a `while` whose first number counts up to its second as a loop over numbers."""
    first, end, *carry = carry
    found = _for(at, first, end, body, inputs, carry, equation.out_avals[2:], 0, end)
    last = at.writer.binary("arith.maxsi", first, end) if equation.used[0] else end
    return [last, end, *found]


def _for(
    at: Translator,
    first: Value,
    end: Value,
    body: Any,
    inputs: Sequence[Any],
    carry: Sequence[Value],
    avals: Sequence[Any],
    counter: int | None,
    bound: Value | None = None,
) -> list[Value]:
    """Write a loop over whole numbers.

    Args:
        at: what writes.
        first, end: the first number, and the one after the last.
        body: of the inputs, then of what is carried, the number and the bound among it.
        inputs: the same in each round.
        carry: without the number and the bound.
        avals: the carried values' shapes and dtypes.
        counter: 0 if the body takes the number, else None.
        bound: what the body takes after the number, if it does.
    """
    writer = at.writer
    taken = (counter is not None) + (bound is not None)
    results, inside = _results(at, avals), _arguments(at, avals)
    number = Value(writer.name(), first.element)
    one = writer.constant(1, first.element)
    carried = f" iter_args({_started(inside, carry)}) -> ({_types(results)})" if results else ""
    writer.line(
        f"{_named(results)}scf.for {number.name} = {first.name} to {end.name} step {one.name}"
        f"{carried} : {first.element} {{"
    )
    with writer.block():
        head = [number, bound][:taken]
        _give(at, at.translate(body, [*inputs, *head, *inside])[taken:])
    writer.line("}")
    return results


def _kept(at: Translator, new: Value, old: Value) -> Value:
    """Write a loop's new number as if the old one mattered: LLVM sees that it does not.

    Before version 3.9 Triton fails at a loop that carries tensors, and a number that only its test
    reads.
    """
    if not new.element.startswith("i"):
        return new
    most, least = ("arith.ori", "arith.andi") if new.element == "i1" else _ENDS
    return at.writer.binary(least, at.writer.binary(most, new, old), new)


def _counts_up(test: Any, body: Any, constants: int) -> bool:
    """Whether a loop goes on while its first number is less than its second, which stays."""
    if len(test.eqns) != 1 or test.eqns[0].primitive.name != "lt" or len(test.invars) < 2:
        return False
    [compare] = test.eqns
    stays = body.outvars[1] is body.invars[constants + 1]
    return (
        stays
        and list(compare.invars) == list(test.invars[:2])
        and list(compare.outvars) == list(test.outvars)
        and compare.invars[0].aval.dtype == jnp.int32
        and not compare.invars[0].aval.shape
        and _increments(body, constants, 0)
    )


def _increments(body: Any, constants: int, place: int) -> bool:
    """Whether a loop's body adds 1 to an int32 that it carries."""
    number, after = body.invars[constants + place], body.outvars[place]
    if number.aval.shape or number.aval.dtype != jnp.int32:
        return False
    for equation in body.eqns:
        if equation.primitive.name == "add" and equation.outvars[0] is after:
            x, y = equation.invars
            return x is number and isinstance(y, core.Literal) and int(y.val) == 1
    return False


def _read(jaxpr: Any) -> set[Any]:
    """Find what a jaxpr's equations and results read."""
    atoms = [atom for equation in jaxpr.eqns for atom in equation.invars] + list(jaxpr.outvars)
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _open(closed: Any) -> Any:
    """Return a jaxpr that closes over nothing."""
    if getattr(closed, "consts", None):
        raise NotImplementedError("own Triton lowering: a kernel's part that closes over arrays")
    return getattr(closed, "jaxpr", closed)


def _results(at: Translator, avals: Sequence[Any]) -> list[Value]:
    """Values that one operation makes together."""
    name = at.writer.name()
    return [
        Value(f"{name}#{number}", element_of(aval.dtype), aval.shape)
        for number, aval in enumerate(avals)
    ]


def _arguments(at: Translator, avals: Sequence[Any]) -> list[Value]:
    """Values that a block begins with, each with a name of its own."""
    return [Value(at.writer.name(), element_of(aval.dtype), aval.shape) for aval in avals]


def _merged(changes: Sequence[bool], changed: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Put changed values in their places among all."""
    left = iter(changed)
    return [next(left) if change else other for change, other in zip(changes, others, strict=True)]


def _give(at: Translator, values: Sequence[Value]) -> None:
    if values:
        at.writer.line(f"scf.yield {_names(values)} : {_types(values)}")


def _named(results: Sequence[Value]) -> str:
    if not results:
        return ""
    return f"{results[0].name.split('#')[0]}:{len(results)} = "


def _started(names: Sequence[Value], values: Sequence[Value]) -> str:
    return ", ".join(
        f"{name.name} = {value.name}" for name, value in zip(names, values, strict=True)
    )


def _names(values: Sequence[Value]) -> str:
    return ", ".join(value.name for value in values)


def _types(values: Sequence[Value]) -> str:
    return ", ".join(value.type for value in values)
